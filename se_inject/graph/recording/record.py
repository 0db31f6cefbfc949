"""Model + example input -> how its modules are called, and which of them add maps.

One forward of a copy of the model runs on meta tensors, without arithmetic and memory. The model
itself is neither run nor changed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from se_inject.errors import ForwardError, first_line
from se_inject.graph.containers import tensors_in
from se_inject.graph.frames import place_of_error
from se_inject.graph.meta import needs_values, on_meta
from se_inject.graph.recording.adders import credit_callers
from se_inject.graph.recording.call import Arguments, Recording
from se_inject.graph.recording.missed import missed_modules
from se_inject.graph.recording.recorder import Recorder
from se_inject.graph.thread import raise_interruption
from se_inject.names import block_label


def record(
    twin: nn.Module, examples: Sequence[Arguments], device: torch.device, *, follow: bool = False
) -> Recording:
    """Record one forward, with the first of the examples that it accepts.

    Args:
        twin: a :func:`meta_copy` of the model.
        examples: (args, kwargs) on meta, as :func:`example_inputs` gives them.
        device: the device that the model is on. If the forward asks for devices, it gets this one.
        follow: whether to find out the channel dims of the arguments of modules. This takes longer.

    Raises:
        ForwardError: the forward fails on all examples, and not because it needs values that meta
            tensors do not have. The message is that of the attempt that got furthest.
    """
    failures: list[tuple[int, ForwardError]] = []
    for guesses in (True, False):
        guessed = False
        for args, kwargs in examples:
            recorder = Recorder(twin, (args, kwargs), follow, guesses)
            try:
                return _record(twin, recorder, args, kwargs, device)
            except ForwardError as error:
                failures.append((len(recorder.calls), error))
                guessed = guessed or bool(recorder.guessed)
        if not guessed:  # otherwise a guess may have led all of them astray
            break
    # The attempt that got furthest says most, because others failed at a guess of ours.
    raise max(failures, key=lambda failure: failure[0])[1]


def _record(
    twin: nn.Module,
    recorder: Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> Recording:
    stopped = None
    missed: tuple[str, ...] = ()
    try:
        with on_meta(device), recorder:
            twin(*args, **kwargs)
    except Exception as error:  # a foreign forward may raise anything
        raise_interruption(error)
        where = recorder.failed
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not needs_values(error):
            raise ForwardError(
                f"the forward of {block_label(where)} failed on an input of shape"
                f" {_describe_input(args, kwargs)}: {reason}\n"
                "Pass example_input= (on the command line --img-size, --in-chans) as the model"
                " expects it."
            ) from error
        missed = tuple(missed_modules(twin, recorder.calls, recorder.failed))
        stopped = (
            f"{block_label(where)} needs values, which tensors have not while a plan is made"
            f"{place_of_error(error)}"
        )
    finally:
        for hook in recorder.hooks:
            hook.remove()
    credit_callers(recorder.calls, dict(twin.named_modules()))
    calls = {
        name: calls
        for name, calls in recorder.calls.items()
        if any(call.additions for call in calls)
    }
    return Recording(calls, stopped, missed, tuple(recorder.guessed), (args, kwargs))


def _describe_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors_in((args, kwargs))) or "no tensor"
