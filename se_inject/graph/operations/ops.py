"""What the torch functions of a forward do to feature maps: a log, and two facts about tensors.

Works at the level of functions, not of module classes, so that a convolution is one whether it
is ``nn.Conv2d``, timm's ``ScaledStdConv2d`` or ``F.conv2d`` in a hand-written block.
"""

from dataclasses import dataclass

from se_inject.layers.layout import KINDS

ADD = {"add", "add_", "__add__", "__iadd__", "__radd__"}
MULTIPLY = {"mul", "mul_", "multiply", "multiply_", "__mul__", "__imul__", "__rmul__"}
DIVIDE = {"div", "div_", "true_divide", "divide", "__truediv__", "__itruediv__"}
CONVOLUTION = frozenset[str]().union(*(kind.functions for kind in KINDS.values()))
# A conv1d of one channel into one slides over the channels themselves, as in ECA's gate.
OVER_CHANNELS = "conv1d over channels"
CHANNELS_FIRST_NORM = {"batch_norm", "instance_norm", "group_norm"}
CHANNELS_LAST_LAYER = {"linear", "layer_norm", "rms_norm"}
DROPOUT = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
PERMUTE = {"permute", "transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis"}
RESHAPE = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
# Mix positions and channels; "__get__" reads x.T and the like.
REARRANGE = {"unfold", "fold", "__get__"}
MATRIX_PRODUCT = {"matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"}
SIGMOID = {"sigmoid", "sigmoid_", "hardsigmoid", "softmax", "tanh", "logsigmoid"}
# Act on each element alone. In-place names of methods count too.
ACTIVATION = {"relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "gelu"}
ACTIVATION |= {"silu", "mish", "hardswish", "hardtanh", "softplus", "softsign", "clamp", "clip"}
ACTIVATION |= SIGMOID - {"softmax"}
# Take only the shape or dtype from their second tensor.
LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}
# What an excitation passes; the reciprocal deviation of a norm does not.
EXCITE = SIGMOID | CONVOLUTION | {OVER_CHANNELS, "linear"} | MATRIX_PRODUCT
SUBTRACT = {"sub", "sub_", "subtract", "__sub__", "__isub__", "__rsub__"}
NEGATE = {"neg", "negative", "__neg__"}
# Mix two maps in other ways than a sum of both.
BLEND = {"lerp", "lerp_", "_foreach_add", "_foreach_add_", "_foreach_lerp", "addcdiv", "addcdiv_"}
BLEND |= {"index_add", "index_add_", "scatter_add", "scatter_add_", "logaddexp"}
# Enlarge a map, if its output has more positions than its input.
ENLARGE = {"interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "pixel_shuffle"}
ENLARGE |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "repeat_interleave"}
ENLARGE |= {"max_unpool1d", "max_unpool2d", "max_unpool3d"}
JOIN = {"cat", "concat", "concatenate", "stack"}
# Take only shape, dtype and device from their tensor: random masks are made so.
CREATION = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like"}
CREATION |= {"new", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
# Linear in the map: a sum of such paths is one convolution, if somebody folds it.
LINEAR_IN_MAP = ADD | SUBTRACT | CONVOLUTION | CHANNELS_FIRST_NORM | DROPOUT | PERMUTE | {"pad"}
LINEAR_IN_MAP |= {"avg_pool1d", "avg_pool2d", "avg_pool3d", "contiguous", "sum", "stack"}


@dataclass(frozen=True, slots=True)
class Op:
    """One torch function that ran on a tensor computed from the input ("live")."""

    name: str
    shape: tuple[int, ...]  # of its first tensor output
    adds_maps: bool = False  # two live tensors of one shape
    alpha: float = 1.0  # of an addition
    blends: bool = False  # two live tensors of one shape, but not as a sum of two operands
    stacked: bool = False  # an addition whose operands are the items of the stack that it reads
    enlarges: bool = False  # a map of more positions than its input has
    gates: bool = False  # a live map times a live per-channel gate, constant over space
    scales: bool = False  # a live map times or by constants or parameters
    kernel: tuple[int, ...] = ()  # of a convolution: [out, in / groups, *space]

    @property
    def is_convolution(self) -> bool:
        return self.name in CONVOLUTION

    @property
    def is_spatial_convolution(self) -> bool:
        """A convolution that sees more than one position."""
        return any(size > 1 for size in self.kernel[2:])

    @property
    def is_depthwise(self) -> bool:
        """A convolution of each channel alone."""
        return self.is_convolution and self.kernel[1:2] == (1,) and self.shape[1] > 1

    @property
    def is_affine(self) -> bool:
        """A norm, or the factor or summand that is left of one that is frozen."""
        norms = CHANNELS_FIRST_NORM | {"layer_norm", "rms_norm"}
        return self.name in norms or self.scales or (self.name in ADD and not self.adds_maps)

    @property
    def is_activation(self) -> bool:
        """Acts on each element of one map alone."""
        return self.name.rstrip("_") in ACTIVATION

    @property
    def is_product(self) -> bool:
        """Of a map and a number, a parameter or another map (``x * sigmoid(x)``)."""
        return self.name in MULTIPLY and not self.gates

    @property
    def is_permutation(self) -> bool:
        return self.name in PERMUTE

    @property
    def reads_channels_first(self) -> bool:
        """Knows the channels of its input at dim 1."""
        return self.is_convolution or self.name in CHANNELS_FIRST_NORM

    @property
    def adds_depth(self) -> bool:
        """A convolution, or a Linear over the channels of a map or of tokens."""
        return self.is_convolution or (self.name == "linear" and len(self.shape) >= 3)

    @property
    def is_pooling(self) -> bool:
        """Makes another map of fewer, or of more, positions."""
        return "pool" in self.name or self.name in ("interpolate", "boolean_dispatch")

    @property
    def is_dropout(self) -> bool:
        return self.name in DROPOUT

    @property
    def joins(self) -> bool:
        """Brings two paths together, so that what runs it is no straight path."""
        return self.adds_maps or self.pads or self.name in SUBTRACT

    @property
    def pads(self) -> bool:
        """Puts maps side by side: no more than padding, where one map alone has content."""
        return self.name in JOIN or self.name == "__setitem__"

    @property
    def is_linear_in_map(self) -> bool:
        return self.name in LINEAR_IN_MAP or self.scales
