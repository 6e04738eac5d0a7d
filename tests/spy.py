"""Run by test_train.py in place of train.py, with a file before its arguments: notes which rows of documents
each rank makes.

A line of the file is a JSON list of [source, document, context start, context end, start, end], one for each
piece in the row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from common import files, terminal
from data.stream import HELD_OUT, Stream
from training.parallel import RANK

file, make = Path(sys.argv.pop(1)), Stream.make


def noted(stream, row):
    if not (row[:, 0] == HELD_OUT).any():
        files.append_line(f"{file}.{RANK}", row.tolist())
    return make(stream, row)


Stream.make = noted
terminal.run(train.main)
