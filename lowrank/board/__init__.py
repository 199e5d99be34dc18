"""The board: a face of the commands in a browser. Every button is one `lowrank` command.

The process that answers the browser imports no torch: what a person starts runs in children (children.py), state is
read from the files they leave (tasks.py, runs.py), and commands that need the heavy packages run in a warm
worker (warm_worker.py).
"""
