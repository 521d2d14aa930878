"""Runs the command as ``python -m lora_capacity_cli``."""

from lora_capacity_cli.main import main

if __name__ == "__main__":
    main()
