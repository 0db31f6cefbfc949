"""Lets children answer with what they returned in a recorded call, so that they do not run again.

Blocks contain other blocks. If each block ran everything in it whenever it is looked at, a network
would run as often as its blocks are nested.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from se_inject.graph.containers import leaves, tensors_in
from se_inject.graph.operations.log import OpLog
from se_inject.graph.operations.ops import Op
from se_inject.graph.recording.call import Call
from se_inject.torch_private import pytree, without_torch_functions


class Replay:
    """Answers for the children of one block during one run of its forward.

    Args:
        block: the block whose own forward runs.
        call: its recorded call.
        log: gets one entry for each call of a child, with the arguments of the child.
    """

    def __init__(self, block: nn.Module, call: Call, log: OpLog) -> None:
        self.call, self.log = call, log
        self.paths = {id(module): path for path, module in block.named_modules()}
        self.answers = {name: iter(calls) for name, calls in call.children.items()}

    def call_module(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """What a child returned. An identity runs, and so does a layer without a recorded call."""
        name = f"{self.call.name}.{self.paths.get(id(module), '')}".lstrip(".")
        recorded = next(self.answers.get(name, iter(())), None)
        if recorded is None or type(module) is nn.Identity:
            return original(module, *args, **kwargs)
        given = tensors_in((args, kwargs))
        with without_torch_functions():
            said = [
                (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v
                for v in leaves((args, kwargs))
            ]
            self.log.ops.append(Op(f"self.{self.paths[id(module)]}({said})", ()))
            output = output_of(recorded, given)
            self.log.ensure_followed(output, given)
            return output


def output_of(
    call: Call, given: Sequence[Tensor], alias: Callable[[Tensor], Tensor] = Tensor.detach
) -> Any:
    """The output of a recorded call for new inputs.

    Where the call returned one of its inputs, the new input takes its place.

    Args:
        call: the recorded call.
        given: the tensors in the new arguments.
        alias: makes a new tensor from each tensor that the call made, so that nobody else has it.
    """
    recorded = tensors_in((call.args, call.kwargs))

    def fresh(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        same = [g for r, g in zip(recorded, given, strict=False) if r is leaf]
        return same[0] if same else alias(leaf)

    return pytree.tree_map(fresh, call.output)
