"""The export formats, which write networks that need no se_inject.

A new format needs one file beside this one, which ends in a ``Format``, and one row of
:data:`FORMATS`. Neighbours call ``FORMATS[name].write(model, path)``.
"""

from se_inject.keep.formats.format import Format
from se_inject.keep.formats.onnx import ONNX
from se_inject.keep.formats.program import TORCH_EXPORT
from se_inject.keep.formats.stock import STOCK

FORMATS: dict[str, Format] = {
    "stock": STOCK,
    "torch-export": TORCH_EXPORT,
    "onnx": ONNX,
}
