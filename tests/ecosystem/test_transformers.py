"""transformers saves and loads injected models: save_pretrained, the Trainer, TimmWrapper."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from se_inject import ArgumentError, CheckpointError, inject_se, se_parameters
from se_inject.transformers import from_pretrained, remember_se

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of transformers, about itself
]

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def timm_wrapper() -> Any:
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    return transformers.TimmWrapperForImageClassification(config)


KINDS = {"ResNet": resnet, "TimmWrapper": timm_wrapper}


def opened(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in se_parameters(model):
            p.normal_(0, 0.5)
    return model.eval()


def check_same(got: Any, model: Any) -> None:
    """All tensors are equal. Outputs may differ in the last bit: mapped files are not aligned."""
    state = got.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(got) is type(model)
    torch.testing.assert_close(got(X).logits, model(X).logits, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_has_its_se_blocks_again(kind: str, auto: bool, tmp_path: Path) -> None:
    model = opened(remember_se(inject_se(KINDS[kind](), 4, gate="tanh", divisor=1)))
    model.save_pretrained(tmp_path)
    loader = transformers.AutoModelForImageClassification if auto else type(model)
    again = from_pretrained(loader, tmp_path)
    check_same(again, model)
    assert again.config.se_inject == model.config.se_inject
    again.save_pretrained(tmp_path / "again")  # what was loaded can be saved in its turn
    check_same(from_pretrained(loader, tmp_path / "again"), model)


def test_without_the_call_the_tensors_are_dropped(tmp_path: Path) -> None:
    """What the call is for: transformers itself says so in a report only."""
    model = opened(remember_se(inject_se(resnet(), 4)))
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert not any(".se." in key for key in plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_trainer(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = remember_se(inject_se(KINDS[kind](), 4))
    data = [{"pixel_values": x, "labels": k} for k, x in enumerate([*X, *X.flip(-1)[:1]])]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        learning_rate=0.1,
    )
    before = [p.detach().clone() for p in se_parameters(model)]
    transformers.Trainer(model, settings, train_dataset=data).train()
    assert any(not torch.equal(a, b) for a, b in zip(before, se_parameters(model), strict=True))
    again = from_pretrained(type(model), tmp_path / "checkpoint-2")
    check_same(again, model.eval())
    resumed = transformers.Trainer(
        remember_se(inject_se(KINDS[kind](), 4)), settings, train_dataset=data
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_same(resumed.model.eval(), model)


def test_options_of_from_pretrained_go_through(tmp_path: Path) -> None:
    model = opened(remember_se(inject_se(resnet(), 4)))
    model.save_pretrained(tmp_path)
    again, said = from_pretrained(
        type(model), tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert again(X).logits.shape == (2, 5)
    assert len(said["mismatched_keys"]) == 2
    half = from_pretrained(type(model), tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_model_that_was_saved_without_being_remembered(tmp_path: Path) -> None:
    model = opened(inject_se(resnet(), 4, include="*encoder*"))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not say what was injected"):
        from_pretrained(type(model), tmp_path)
    again = from_pretrained(type(model), tmp_path, injection={"r": 4, "include": "*encoder*"})
    check_same(again, model)


def test_a_folder_without_the_tensors_is_refused(tmp_path: Path) -> None:
    resnet().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no tensors of SE blocks"):
        from_pretrained(transformers.ResNetForImageClassification, tmp_path, injection={"r": 4})


def test_only_models_of_transformers_have_a_configuration() -> None:
    import timm

    with pytest.raises(ArgumentError, match="has no configuration of transformers"):
        remember_se(inject_se(timm.create_model("test_resnet")))


def test_a_timm_name_of_ours_needs_no_call(tmp_path: Path) -> None:
    import se_inject.timm  # noqa: F401  # its import registers the names

    config = transformers.TimmWrapperConfig(
        architecture="se_inject_test_resnet", num_labels=3, model_args={"r": 4}
    )
    model = opened(transformers.TimmWrapperForImageClassification(config))
    model.save_pretrained(tmp_path)
    check_same(transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path), model)
