"""The words every room shares (frame, wire, settings, errors, status), and the command line."""
