"""`longctx generate` from a checkout. See `python generate.py --help`."""

from longctx.commands.generate import main

if __name__ == "__main__":
    main()
