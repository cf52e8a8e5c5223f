"""The `octavo` command. One module for each group of commands; main.py puts them together."""
