"""Converters and quantizers take an injected model, and give its outputs."""

from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from helpers import open_gates, randomize
from torch import Tensor, nn

from se_inject import SqueezeExcite, inject_se, set_plain_ops
from se_inject.keep.fold import fold_gates
from se_inject.keep.formats.onnx import write_onnx

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of the tools, about themselves
]

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    model = inject_se(randomize(timm.create_model("resnet18", num_classes=5)), example_input=X)
    open_gates(model)
    return set_plain_ops(model).eval()


@pytest.fixture
def base() -> nn.Module:
    return randomize(timm.create_model("resnet18", num_classes=5)).eval()


def more(injected: Counter[str], base: Counter[str]) -> set[str]:
    """The kinds of operations that only the injected network has; it has all of the base's."""
    assert not base - injected
    return set(injected) - set(base)


def error(got: Tensor, model: nn.Module, x: Tensor = X) -> float:
    """The largest difference to the model, as a share of its largest output."""
    with torch.no_grad():
        expected = model(x)
    return float((got - expected).abs().max() / expected.abs().max())


def test_the_operations_that_are_added_are_known_to_each_converter(
    model: nn.Module, base: nn.Module
) -> None:
    """Beside those of the base, a converted network has sigmoids, products and more means."""
    openvino = pytest.importorskip("openvino")
    coremltools = pytest.importorskip("coremltools")
    seen = []
    for network in (model, base):
        converted = openvino.convert_model(network, example_input=X)
        seen.append([Counter(op.get_type_name() for op in converted.get_ops())])
        source = torch.export.export(network, (X,)).run_decompositions({})
        program = coremltools.convert(source, convert_to="mlprogram")._mil_program
        seen[-1].append(Counter(op.op_type for op in program.functions["main"].operations))
    injected, plain = seen
    assert more(injected[0], plain[0]) == {"Multiply", "Sigmoid"}
    assert more(injected[1], plain[1]) == {"mul", "sigmoid"}


def test_onnxruntime(model: nn.Module, base: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    write_onnx(model, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    x = torch.randn(3, 3, 96, 80)
    (got,) = session.run(None, {"input": x.numpy()})
    assert error(torch.from_numpy(got), model, x) < 1e-5
    onnx = pytest.importorskip("onnx")
    torch.onnx.export(base, (X,), tmp_path / "base.onnx", dynamo=True, verbose=False)
    counts = []
    for name in ("net.onnx", "base.onnx"):
        nodes = onnx.load(tmp_path / name).graph.node
        counts.append(Counter(f"{node.domain}{node.op_type}" for node in nodes))
    assert {"Mul", "Sigmoid"} <= set(counts[0]) - set(counts[1])
    assert not any("." in name for name in counts[0])  # a domain of somebody's own


@pytest.mark.parametrize("way", ["torch", "onnx"])
def test_openvino(model: nn.Module, way: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    if way == "torch":
        converted = openvino.convert_model(model, example_input=X)
    else:
        write_onnx(model, tmp_path / "net.onnx")
        converted = openvino.convert_model(tmp_path / "net.onnx")
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (got,) = compiled([X.numpy()]).values()
    assert error(torch.from_numpy(got), model) < 1e-5


@pytest.mark.parametrize("way", ["trace", "export"])
def test_core_ml(model: nn.Module, way: str, tmp_path: Path) -> None:
    """Core ML runs on macOS only; elsewhere the program is built and its operations are read."""
    coremltools = pytest.importorskip("coremltools")
    if way == "trace":
        source = torch.jit.trace(model, X)
        kinds = {"inputs": [coremltools.TensorType(name="input", shape=X.shape)]}
    else:
        source = torch.export.export(model, (X,)).run_decompositions({})
        kinds = {}
    converted = coremltools.convert(source, convert_to="mlprogram", **kinds)
    operations = [op.op_type for op in converted._mil_program.functions["main"].operations]
    blocks = sum(isinstance(module, SqueezeExcite) for module in model.modules())
    assert operations.count("reduce_mean") >= blocks
    assert operations.count("add") >= blocks
    if coremltools.utils._is_macos():
        name = next(iter(converted.get_spec().description.input)).name
        (got,) = converted.predict({name: X.numpy()}).values()
        assert error(torch.from_numpy(got), model) < 1e-2  # computed in float16


def test_the_x86_quantizer_of_pt2e_sees_what_it_sees_in_timms_network(model: nn.Module) -> None:
    """The same operations are quantized as in seresnet18, and no sum is hidden in another one."""
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    fold_gates(model)  # The factor 2 of the gates would be one more multiplication each.
    stock = timm.create_model("seresnet18", num_classes=5).eval()
    stock.load_state_dict(model.state_dict())
    counts = []
    for network in (model, stock):
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(network, (X,)).module(), quantizer)
        prepared(X)
        quantized = convert_pt2e(prepared)
        assert error(quantized(X), network) < 0.1
        names = [str(n.target).replace("_.default", ".default") for n in quantized.graph.nodes]
        names = [name.replace("add_", "add") for name in names]  # in place or not
        counts.append(Counter(name for name in names if "." in name and "layer" not in name))
    assert sum("quantize" in name for name in counts[0].elements()) > 40
    assert "aten.addcmul.default" not in counts[0]
    assert counts[0] == counts[1]


def test_the_x86_quantizer_leaves_no_layer_that_it_quantizes_in_the_base(
    model: nn.Module, base: nn.Module
) -> None:
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    for network in (base, model):
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(network, (X,)).module(), quantizer)
        prepared(X)
        nodes = convert_pt2e(prepared).graph.nodes
        layers = [n for n in nodes if str(n.target).startswith(("aten.conv2d", "aten.linear"))]
        assert len(layers) >= 21
        assert all("dequantize" in str(of.target) for n in layers for of in n.all_input_nodes[:2])


def test_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    head = model.fc.weight.shape
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert model.fc.weight.shape == head
    assert type(model.fc.weight) is not nn.Parameter
    reference = inject_se(timm.create_model("resnet18", num_classes=5), example_input=X).eval()
    state = model.state_dict()
    state["fc.weight"] = state["fc.weight"].dequantize()
    reference.load_state_dict(state)
    assert error(model(X), reference) < 1e-2
