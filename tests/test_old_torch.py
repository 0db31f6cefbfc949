"""What se_inject does itself where torch is old, tried in every version of torch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from se_inject import inject_se, plan_se
from se_inject.keep.formats import old_torch
from se_inject.keep.formats.old_torch import name_dims
from se_inject.keep.formats.onnx import write_onnx

X = torch.randn(2, 3, 8, 8)


class Normed(nn.Module):
    """A norm that can be folded into its convolution, and one without weights that can not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.bare = nn.BatchNorm2d(3, affine=False)
        for norm in (self.norm, self.bare):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bare(self.norm(self.conv(x)).relu())


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
def test_norms_of_eval_mode_in_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(old_torch, "knows_eval_norms_in_onnx", lambda: False)
    model = inject_se(Normed().eval(), 1, divisor=1, example_input=X)
    write_onnx(model, tmp_path / "net.onnx")  # which compares the outputs
    nodes = onnx.load(tmp_path / "net.onnx").graph.node
    assert [len(n.output) for n in nodes if n.op_type == "BatchNormalization"] == [1]


def test_names_of_dims_in_onnx() -> None:
    ir = pytest.importorskip("onnx_ir")
    x = ir.Value(name="x", shape=ir.Shape(["s0", 3, "s1", "s10"]))
    y = ir.Value(name="y", shape=ir.Shape(["s0", 3, "s1//2", "s10 + s100"]))
    unknown = ir.Value(name="unknown")
    nodes = [
        ir.Node("", "MaxPool", [x], outputs=[y]),
        ir.Node("", "Relu", [y], outputs=[unknown]),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, opset_imports={"": 18})
    for _ in range(2):  # A second time changes nothing.
        name_dims(ir.Model(graph, ir_version=10), [{0: "batch", 1: "not dynamic", 2: "height"}])
        assert x.shape == ["batch", 3, "height", "s10"]
        assert y.shape == ["batch", 3, "height//2", "s10 + s100"]
        assert unknown.shape is None


class Unflattened(nn.Module):
    """The same reshape as a method and as a function, of which torch's own list has neither."""

    def __init__(self, *, as_method: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.as_method = as_method

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2)
        return x + (y.unflatten(2, (8, 8)) if self.as_method else torch.unflatten(y, 2, (8, 8)))


@pytest.mark.parametrize("as_method", [True, False])
def test_a_method_that_torch_does_not_list(as_method: bool) -> None:
    model = Unflattened(as_method=as_method)
    expected = model(X)
    assert [site.channels for site in plan_se(model, 1, divisor=1, example_input=X).sites] == [3]
    assert torch.equal(inject_se(model, 1, divisor=1, example_input=X)(X), expected)
