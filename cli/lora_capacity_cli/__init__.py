"""The ``lora-capacity`` command: parses, makes one library call, renders the answer."""
