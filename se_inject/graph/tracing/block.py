"""One block and its recorded calls -> its graphs with facts, or the reason why it has none."""

from collections.abc import Hashable, Sequence

import torch
from torch import fx, nn

from se_inject.graph.containers import holds_tensor
from se_inject.graph.expect import bind
from se_inject.graph.facts import TracedForward, run_graph
from se_inject.graph.frames import place_of_error
from se_inject.graph.meta import on_meta
from se_inject.graph.recording.call import Call
from se_inject.graph.thread import OtherNetworkError, raise_interruption
from se_inject.graph.thread_state import ForeignRandomNumbers
from se_inject.graph.tracing.arguments import is_symbolic
from se_inject.graph.tracing.tracer import BlockTracer
from se_inject.graph.tracing.undisturbed import unchanged


def trace_block(
    name: str, module: nn.Module, calls: Sequence[Call], device: torch.device
) -> tuple[TracedForward, TracedForward] | str:
    """The eval and train graphs of a block, or a text that says why there are none."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if vars(module).get("qconfig") is not None:
        return "it is prepared for eager quantization; inject first, and quantize by FX or PT2E"
    if not callable(getattr(type(module), "forward", None)):
        return "its forward is no function of its class; exclude= leaves the block out"
    if isinstance(module, fx.GraphModule):
        # Copying one, or recompiling it, would silently bring back its own graph.
        return "it is a GraphModule: inject into the model that it was traced from"
    if sets := [name for call in calls for name in call.sets]:
        return f"its forward sets self.{sets[0]}; keep it in a local variable, or return it"
    if len(calls) > 1 and len({_flags(module, call) for call in calls}) > 1:
        return "it is called with different flags in one forward; exclude= leaves the block out"
    try:
        with unchanged(module), ForeignRandomNumbers() as numbers:
            eval_graph, train_graph = _graphs(name, module, calls[0], device)
            if numbers.drawn():  # a graph would freeze one draw
                raise OtherNetworkError(
                    "its forward draws random numbers outside torch", "draw them with torch.rand"
                )
    except OtherNetworkError as error:
        return str(error)
    except Exception as error:  # foreign Python runs on recorded values and may raise anything
        raise_interruption(error)
        return _failed(error)
    try:
        evaluated = run_graph(module, eval_graph, calls, device)
        if train_graph is eval_graph:
            return evaluated, evaluated
        module.train()
        return evaluated, run_graph(module, train_graph, calls, device)
    except OtherNetworkError as error:
        return str(error)
    except Exception as error:
        raise_interruption(error)
        return f"its graph does not run ({type(error).__name__}); exclude= leaves the block out"
    finally:
        module.eval()


# If code of Python or torch gets a value of the trace, the text of its error has one of these.
_TRACED_KINDS = ("'Int'", "not Int", "Scalar", "Machine", "'Shape'")


def _failed(error: Exception) -> str:
    """What the forward did when it failed in the trace. The text of the error would not help."""
    what = f"raises {type(error).__name__} on a copy that has no values"
    if any(kind in str(error) for kind in _TRACED_KINDS):
        what = "hands a size or a property of a tensor to code that takes plain numbers"
    return f"its forward {what}{place_of_error(error)}; exclude= leaves the block out"


def _graphs(
    name: str, module: nn.Module, call: Call, device: torch.device
) -> tuple[fx.Graph, fx.Graph]:
    """The graphs in eval and train mode. They are one object if the forward reads no mode."""
    own = {id(m) for m in module.modules()}

    def trace() -> tuple[fx.Graph, list[nn.Module]]:
        tracer = BlockTracer(name, call)
        with on_meta(device):
            graph = tracer.trace(module)
        # A layer that the forward itself has made does not count. It keeps the mode it began in.
        return graph, [m for m in tracer.mode_readers if id(m) in own]

    in_eval, readers = trace()
    if not readers:
        return in_eval, in_eval
    module.train()
    in_train, more = trace()
    if any(reader is not module for reader in (*readers, *more)):
        raise OtherNetworkError("its forward reads the mode of a child", "read self.training")
    return in_eval, in_train


def _flags(module: nn.Module, call: Call) -> Hashable:
    """The arguments of a call that decide the path through the forward."""
    arguments = bind(type(module).forward, module, call)
    return tuple(
        (name, None if holds_tensor(v) or is_symbolic(v) else repr(v), holds_tensor(v))
        for name, v in arguments.items()
    )
