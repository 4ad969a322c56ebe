"""PreActResNet for images of 32x32 pixels, which timm does not have."""

from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and activation, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if reshapes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.conv2(self.act2(self.bn2(self.conv1(activated))))


class PreActResNet(nn.Module):
    """Four stages of such blocks; He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016,
    https://arxiv.org/abs/1603.05027, as the adversarial-training literature uses it on CIFAR-10.

    Args:
        depth: blocks a stage: 2 is PreActResNet-18.
        width: channels of the first stage, doubled in each of the others: 64 in PreActResNet-18.
        stride: of the first convolution: 1 in PreActResNet-18.
        num_classes: C.
        in_chans: channels of the images.

    The forward takes (B, in_chans, H, W) and returns logits (B, C).
    """

    def __init__(
        self, depth: int = 2, width: int = 64, stride: int = 1, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, width, 3, stride, 1, bias=False)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            for i in range(depth):
                outputs = width * 2**stage
                blocks.append(_Block(inputs, outputs, stride=2 if stage and i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.act = nn.ReLU()
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))
