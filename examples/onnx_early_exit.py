"""Classify images, each no further than needed. Needs onnxruntime and NumPy, and nothing else.

    coded-resnext export runs/digits --early-exit
    python examples/onnx_early_exit.py runs/digits/export/early-exit images.npy

Prints the class of every image and the coded block that decided, from 1; 0 is the classifier.
`images.npy` is as for onnx_classify.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def shown(name: str) -> str:
    """Returns a name from a file without what would move the cursor or hide text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


if len(sys.argv) != 3 or not sys.argv[2].endswith(".npy"):
    sys.exit("usage: python examples/onnx_early_exit.py FOLDER IMAGES.npy")
folder, file = Path(sys.argv[1]), sys.argv[2]
parts = [
    onnxruntime.InferenceSession(folder / f"part-{i}.onnx", providers=["CPUExecutionProvider"])
    for i in range(len(list(folder.glob("part-*.onnx"))))
]
notes = parts[0].get_modelmeta().custom_metadata_map
names, prepared, criterion = (
    json.loads(notes[key]) for key in ("class_names", "preprocessing", "early_exit")
)
images = np.load(file)
if images.dtype == np.uint8:
    images = images / 255
mean, std = (np.reshape(prepared[key], (-1, 1, 1)) for key in ("mean", "std"))
x = ((images - mean) / std).astype(np.float32)
classes, exits = np.zeros(len(x), np.int64), np.zeros(len(x), np.int64)
remaining, previous = np.arange(len(x)), None
for block, (part, wanted) in enumerate(zip(parts, criterion["margins"], strict=False), 1):
    x, said, margin = part.run(["map", "class", "margin"], {"x": x})
    leaving = np.full(len(x), wanted is not None) & (margin >= (wanted or 0))
    if criterion["agreement"]:
        leaving &= False if previous is None else said == previous
    classes[remaining[leaving]], exits[remaining[leaving]] = said[leaving], block
    x, remaining, previous = x[~leaving], remaining[~leaving], said[~leaving]
    if not len(x):
        break
else:
    classes[remaining] = parts[-1].run(["logits"], {"x": x})[0].argmax(1)
for number, (index, block) in enumerate(zip(classes, exits, strict=True)):
    print(number, shown(names[index]), block)
