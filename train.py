"""`longctx train` from a checkout: `deepspeed train.py recipe=pi`. See `python train.py --help`."""

from longctx.commands.train import main

if __name__ == "__main__":
    main()
