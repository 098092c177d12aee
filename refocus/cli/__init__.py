"""The command line: one small file a group of commands, each imported only to describe itself.

A command imports the rooms it needs inside its function, so that `refocus --help` answers at once
and `refocus check` needs neither Micro-Manager nor an engine.
"""
