"""Command lines: thin, each a main(argv)."""
