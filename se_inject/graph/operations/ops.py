"""What each torch function does to feature maps.

The functions count, and not the classes of modules. A convolution is a convolution whether it is
``nn.Conv2d``, timm's ``ScaledStdConv2d`` or ``F.conv2d`` in a hand-written block.
"""

from dataclasses import dataclass

from se_inject.layers.layout import KINDS

ADD = {"add", "add_", "__add__", "__iadd__", "__radd__"}
MULTIPLY = {"mul", "mul_", "multiply", "multiply_", "__mul__", "__imul__", "__rmul__"}
DIVIDE = {"div", "div_", "true_divide", "divide", "__truediv__", "__itruediv__"}
CONVOLUTION = frozenset[str]().union(*(kind.functions for kind in KINDS.values()))
# A conv1d from one channel to one channel slides over the channels themselves, as in ECA's gate.
OVER_CHANNELS = "conv1d over channels"
CHANNELS_FIRST_NORM = {"batch_norm", "instance_norm", "group_norm"}
CHANNELS_LAST_LAYER = {"linear", "layer_norm", "rms_norm"}
DROPOUT = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"}
PERMUTE = {"permute", "transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis"}
RESHAPE = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
# These mix positions and channels. "__get__" reads x.T and the like.
REARRANGE = {"unfold", "fold", "__get__"}
MATRIX_PRODUCT = {"matmul", "__matmul__", "bmm", "einsum", "scaled_dot_product_attention"}
SIGMOID = {"sigmoid", "sigmoid_", "hardsigmoid", "softmax", "tanh", "logsigmoid"}
# These act on each element alone. The in-place names of methods count too.
ACTIVATION = {"relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "gelu"}
ACTIVATION |= {"silu", "mish", "hardswish", "hardtanh", "softplus", "softsign", "clamp", "clip"}
ACTIVATION |= SIGMOID - {"softmax"}
# These take only the shape or dtype from their second tensor.
LIKE = {"expand_as", "view_as", "reshape_as", "type_as"}
# An excitation passes through one of these. The reciprocal deviation of a norm does not.
EXCITE = SIGMOID | CONVOLUTION | {OVER_CHANNELS, "linear"} | MATRIX_PRODUCT
SUBTRACT = {"sub", "sub_", "subtract", "__sub__", "__isub__", "__rsub__"}
NEGATE = {"neg", "negative", "__neg__"}
# These mix two maps in other ways than by a sum of both.
BLEND = {"lerp", "lerp_", "_foreach_add", "_foreach_add_", "_foreach_lerp", "addcdiv", "addcdiv_"}
BLEND |= {"index_add", "index_add_", "scatter_add", "scatter_add_", "logaddexp"}
# These enlarge a map if the output has more positions than the input.
ENLARGE = {"interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "pixel_shuffle"}
ENLARGE |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "repeat_interleave"}
ENLARGE |= {"max_unpool1d", "max_unpool2d", "max_unpool3d"}
JOIN = {"cat", "concat", "concatenate", "stack"}
# These take only shape, dtype and device from their tensor. Random masks are made this way.
CREATION = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like"}
CREATION |= {"new", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
# These are linear in the map. A sum of such paths becomes one convolution if somebody folds it.
LINEAR_IN_MAP = ADD | SUBTRACT | CONVOLUTION | CHANNELS_FIRST_NORM | DROPOUT | PERMUTE | {"pad"}
LINEAR_IN_MAP |= {"avg_pool1d", "avg_pool2d", "avg_pool3d", "contiguous", "sum", "stack"}


@dataclass(frozen=True, slots=True)
class Op:
    """One torch function that ran on a tensor computed from the input ("live")."""

    name: str
    shape: tuple[int, ...]  # the shape of its first output tensor
    adds_maps: bool = False  # whether it adds two live tensors of one shape
    alpha: float = 1.0  # the factor of the second operand of an addition
    blends: bool = False  # whether it mixes two live tensors of one shape, but not by a sum
    stacked: bool = False  # whether it adds the items of the stack that it reads
    enlarges: bool = False  # whether its output has more positions than its input
    gates: bool = False  # whether it multiplies a live map by a live gate, one number per channel
    scales: bool = False  # whether it multiplies or divides a live map by what is not live
    kernel: tuple[int, ...] = ()  # the weight's shape in a convolution: [out, in / groups, *space]

    @property
    def is_convolution(self) -> bool:
        return self.name in CONVOLUTION

    @property
    def is_spatial_convolution(self) -> bool:
        """Whether it is a convolution that sees more than one position."""
        return any(size > 1 for size in self.kernel[2:])

    @property
    def is_depthwise(self) -> bool:
        """Whether it is a convolution of each channel alone."""
        return self.is_convolution and self.kernel[1:2] == (1,) and self.shape[1] > 1

    @property
    def is_affine(self) -> bool:
        """Whether it is a norm, or the factor or summand that a frozen norm consists of."""
        norms = CHANNELS_FIRST_NORM | {"layer_norm", "rms_norm"}
        return self.name in norms or self.scales or (self.name in ADD and not self.adds_maps)

    @property
    def is_activation(self) -> bool:
        """Whether it acts on each element of one map alone."""
        return self.name.rstrip("_") in ACTIVATION

    @property
    def is_product(self) -> bool:
        """Whether it multiplies a map by a number, a parameter or a map (``x * sigmoid(x)``)."""
        return self.name in MULTIPLY and not self.gates

    @property
    def is_permutation(self) -> bool:
        return self.name in PERMUTE

    @property
    def reads_channels_first(self) -> bool:
        """Whether it takes dim 1 of its input as the channels."""
        return self.is_convolution or self.name in CHANNELS_FIRST_NORM

    @property
    def adds_depth(self) -> bool:
        """Whether it is a convolution, or a Linear over the channels of a map or of tokens."""
        return self.is_convolution or (self.name == "linear" and len(self.shape) >= 3)

    @property
    def is_pooling(self) -> bool:
        """Whether it makes a map with fewer or more positions."""
        return "pool" in self.name or self.name in ("interpolate", "boolean_dispatch")

    @property
    def is_dropout(self) -> bool:
        return self.name in DROPOUT

    @property
    def joins(self) -> bool:
        """Whether it brings two paths together, so that the path is no longer straight."""
        return self.adds_maps or self.pads or self.name in SUBTRACT

    @property
    def pads(self) -> bool:
        """Whether it puts maps side by side, which is only padding if just one has content."""
        return self.name in JOIN or self.name == "__setitem__"

    @property
    def is_linear_in_map(self) -> bool:
        return self.name in LINEAR_IN_MAP or self.scales
