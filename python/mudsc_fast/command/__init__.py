"""The parts of the command ``mudsc-fast``: arguments, subcommands, messages, completion."""
