"""`longctx evaluate` from a checkout. See `python evaluate.py --help`."""

from longctx.commands.evaluate import main

if __name__ == "__main__":
    main()
