"""``set_plain_ops``: the same function from mean, multiply and add, and the way back."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import small_net
import timm
import torch
from helpers import open_gates, randomize
from torch import nn

from se_inject import ExportError, NoSiteError, SqueezeExcite, inject_se, set_plain_ops
from se_inject.keep.formats.onnx import write_onnx

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def operations(model: nn.Module) -> set[str]:
    """The operations that torch.export sees."""
    program = torch.export.export(model, (X,))
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.filterwarnings("ignore")  # of torch.export, about itself
def test_converters_see_mean_multiply_and_add_and_there_is_a_way_back() -> None:
    model = inject_se(timm.create_model("test_resnet"), example_input=X).eval()
    fused = {"aten.addcmul.default", "aten.sum.dim_IntList"}
    assert fused <= operations(model)
    assert set_plain_ops(model) is model
    plain = operations(model)
    assert not fused & plain
    assert {"aten.mean.dim", "aten.mul.Tensor"} <= plain
    assert fused <= operations(set_plain_ops(model, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_keeps_its_bits(dtype: torch.dtype) -> None:
    model = randomize(timm.create_model("resnet18")).to(dtype).eval()
    x = X.to(dtype)
    expected = model(x)
    set_plain_ops(inject_se(model, example_input=x))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_only_roundings_differ_and_the_way_back_is_exact(name: str) -> None:
    model = inject_se(randomize(timm.create_model(name)).eval(), example_input=X)
    open_gates(model)
    before = model(X)
    torch.testing.assert_close(set_plain_ops(model)(X), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(set_plain_ops(model, False)(X), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
def test_a_plain_block_is_scripted_copied_and_pickled(squeeze: Any) -> None:
    se = SqueezeExcite(16, 8, squeeze=squeeze)
    se.set_plain(True)
    nn.init.normal_(se.fc2.weight)
    x, residual = torch.randn(2, 2, 16, 5, 5).unbind()
    for other in (torch.jit.script(se), copy.deepcopy(se), pickle.loads(pickle.dumps(se))):
        assert other.plain
        assert torch.equal(
            other(x, residual),
            x * other.gate(se.fc2(se.fc1(se._squeeze(x, [-1, -2])).relu())) + residual,
        )


def test_a_sum_in_place_keeps_its_dtype() -> None:
    se = SqueezeExcite(16, 8, dtype=torch.bfloat16)
    se.set_plain(True)
    x, residual = torch.randn(2, 16, 5, 5).to(torch.bfloat16), torch.randn(2, 16, 5, 5)
    assert se(x, residual, in_place=True).dtype == torch.bfloat16
    assert se(x, residual).dtype == torch.float32


def test_a_model_without_se_blocks_is_refused_and_one_with_other_layers_is_not() -> None:
    with pytest.raises(NoSiteError, match="ResNet has no SE block"):
        set_plain_ops(timm.create_model("test_resnet"))
    model = inject_se(timm.create_model("test_resnet"), se_layer=lambda channels: nn.Identity())
    assert set_plain_ops(model) is model


# --- ONNX ----------------------------------------------------------------------------------------


class OneSize(nn.Module):
    """A network that flattens its maps takes one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).flatten(1))


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
def test_an_onnx_file_takes_any_size_and_says_what_it_is(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    model = inject_se(
        randomize(timm.create_model("test_resnet")).eval(),
        {"layer4.*": 8, "*": 4},
        example_input=X,
    )
    open_gates(model)
    write_onnx(model, tmp_path / "net.onnx", opset=18)
    assert not any(m.plain for m in model.modules() if isinstance(m, SqueezeExcite))
    file = onnx.load(tmp_path / "net.onnx")
    kinds = {node.op_type for node in file.graph.node}
    assert {"ReduceMean", "Mul", "Add"} <= kinds
    assert "ReduceSum" not in kinds
    assert [entry.version for entry in file.opset_import] == [18]
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert said["network"] == "test_resnet"
    assert set(json.loads(said["r"]).values()) == {4, 8}
    assert said["se_inject"]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("input", ["batch", 3, "height", "width"])
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("output", ["batch", 1000])]
    x = torch.randn(3, 3, 96, 80)
    (got,) = session.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
def test_an_onnx_file_of_a_network_of_one_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    import onnxruntime

    model = inject_se(OneSize().eval(), 4, divisor=1, example_input=X)
    write_onnx(model, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert session.get_modelmeta().custom_metadata_map["r"] == "4"


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
def test_an_opset_that_nobody_has_is_a_clear_error(tmp_path: Path) -> None:
    model = inject_se(small_net.build(), 4, divisor=1, example_input=X)
    with pytest.raises(
        ExportError, match=r"ONNX cannot hold SmallNet \(it stayed at opset 18, not 3"
    ):
        write_onnx(model, tmp_path / "net.onnx", opset=3)
    assert list(tmp_path.iterdir()) == []
