import json
from threading import Barrier, Thread

import pytest

from longctx.eval.journal import Journal


class Counted:
    """Work that remembers what it was asked, and may die at one piece."""

    def __init__(self, dies_at=None):
        self.asked, self.dies_at = [], dies_at

    def __call__(self, piece):
        if piece == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(piece)
        return {"piece": piece, "third": piece / 3}


WANTED = [{"piece": i, "third": i / 3} for i in range(6)]


def each(folder, do, name="task-1", title="t", count=6):
    journal = Journal(folder)
    journal.begin(name)
    return journal, journal.each(title, range(count), do)


def test_without_a_folder_nothing_is_kept():
    journal, found = each(None, lambda piece: (piece, 1))
    assert found == [[i, 1] for i in range(6)]  # as it would come back from a file
    journal.end()


def test_finished_pieces_are_not_done_again(tmp_path):
    folder = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        each(folder, Counted(dies_at=4))
    later = Counted()
    journal, found = each(folder, later)
    assert later.asked == [4, 5] and found == WANTED
    journal.end()
    assert not folder.exists()  # the result is written elsewhere


def test_another_task_or_title_starts_anew(tmp_path):
    each(tmp_path, Counted())
    for change in ({"name": "task-2"}, {"title": "u"}):
        again = Counted()
        each(tmp_path, again, **change)
        assert again.asked == list(range(6))
    again = Counted()
    each(tmp_path, again, count=7)
    assert again.asked == [6]


@pytest.mark.parametrize("cut", [1, 9, 12])
def test_a_torn_last_line_is_ignored_and_overwritten_by_none(tmp_path, cut):
    each(tmp_path, Counted(), count=3)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    later = Counted()
    assert each(tmp_path, later)[1] == WANTED
    assert 2 in later.asked or cut == 1  # with only its newline gone the line still stands
    last = Counted()
    assert each(tmp_path, last)[1] == WANTED and last.asked == []
    assert [json.loads(x)[1] for x in path.read_text().splitlines()[-3:]] == [3, 4, 5]


def test_a_title_is_used_once(tmp_path):
    journal, _ = each(tmp_path, Counted())
    with pytest.raises(AssertionError, match="already"):
        journal.each("t", range(2), Counted())


def run_ranks(folder, ranks, **more):
    """All ranks as threads: what each did, and what each got."""
    barrier, work, found = Barrier(ranks), [Counted() for _ in range(ranks)], [None] * ranks

    def one(rank):
        journal = Journal(folder, rank, ranks, barrier.wait)
        journal.begin("task-1")
        found[rank] = [journal.each(t, range(6), work[rank], **more) for t in ("t", "u")]
        journal.end()

    threads = [Thread(target=one, args=(rank,)) for rank in range(ranks)]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    return [w.asked for w in work], found


def test_ranks_share_the_pieces_and_all_know_the_whole(tmp_path):
    asked, found = run_ranks(tmp_path / "j", 2)
    assert asked == [[0, 2, 4] * 2, [1, 3, 5] * 2]
    assert found == [[WANTED, WANTED]] * 2 and not (tmp_path / "j").exists()


def test_a_measurement_is_done_by_the_first_rank_alone(tmp_path):
    asked, found = run_ranks(tmp_path / "j", 2, alone=True)
    assert asked == [list(range(6)) * 2, []] and found == [[WANTED, WANTED]] * 2


def test_other_ranks_go_on_where_one_process_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        each(tmp_path / "j", Counted(dies_at=3))
    asked, found = run_ranks(tmp_path / "j", 3)
    assert asked == [[3, 0, 3], [4, 1, 4], [5, 2, 5]] and found[2] == [WANTED, WANTED]


def test_one_line_at_the_end_where_there_is_no_terminal(tmp_path, capsys):
    each(tmp_path, Counted(), count=2)
    each(tmp_path, Counted(), count=5)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("t: 2 x prompt in ")
    assert second.startswith("t: 3 x prompt in ") and second.endswith("2 kept from before")


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    each(tmp_path, Counted(), count=2)
    each(tmp_path, Counted(), count=4)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "00:00" in shown and "kept" not in shown
