"""One thin file a command: docstring (its help), `add_arguments(parser)`, `main(args)`."""
