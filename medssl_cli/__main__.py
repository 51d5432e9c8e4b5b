"""``python -m medssl_cli`` is the same program as ``medssl``; torchrun starts it this way."""

from medssl_cli.app import main

if __name__ == "__main__":
    main()
