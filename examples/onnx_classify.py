"""Classify images with an exported network. Needs onnxruntime and NumPy, and nothing else.

    coded-resnext export runs/digits --class 3
    python examples/onnx_classify.py runs/digits/export/class-3.onnx images.npy

`images.npy` holds images of the network's size, `[B, C, H, W]`: bytes, or intensities in 0..1.
"""

import json
import sys

import numpy as np
import onnxruntime


def shown(name: str) -> str:
    """Returns a name from a file without what would move the cursor or hide text."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


if len(sys.argv) != 3 or not sys.argv[2].endswith(".npy"):
    sys.exit("usage: python examples/onnx_classify.py MODEL.onnx IMAGES.npy")
model, file = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
notes = session.get_modelmeta().custom_metadata_map
names, threshold, prepared = (
    json.loads(notes[key]) for key in ("class_names", "threshold", "preprocessing")
)
images = np.load(file)
if images.dtype == np.uint8:
    images = images / 255
mean, std = (np.reshape(prepared[key], (-1, 1, 1)) for key in ("mean", "std"))
x = ((images - mean) / std).astype(np.float32)
for number, logits in enumerate(session.run(["logits"], {"images": x})[0]):
    if len(names) > 1:
        print(number, shown(names[logits.argmax()]))
    elif threshold is None:
        print(number, float(logits))
    else:
        print(number, shown(names[0] if logits >= threshold else f"not {names[0]}"))
