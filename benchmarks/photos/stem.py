# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 with the weights of a quantised tflite file, in PyTorch: the stem of the photograph test bed."""

from pathlib import Path

import tflite
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hardware import device, has_fast_bfloat16


CHANNELS, SIDE = 320, 3  # The stem's last map, of images of 96 x 96.
IMAGE_SIDE = 96
OPERATORS = tflite.BuiltinOperator
TYPES = {tflite.TensorType.UINT8: torch.uint8, tflite.TensorType.INT32: torch.int32}


def dequantized(model: tflite.Model, graph: tflite.SubGraph, index: int) -> Tensor:
    """The numbers of a quantised tensor: scale * (stored number - zero point)."""
    tensor = graph.Tensors(index)
    raw = model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes()
    stored = torch.frombuffer(bytearray(raw), dtype=TYPES[tensor.Type()]).reshape(
        tensor.ShapeAsNumpy().tolist()
    )
    quantization = tensor.Quantization()
    return (stored.float() - float(quantization.ZeroPointAsNumpy()[0])) * float(
        quantization.ScaleAsNumpy()[0]
    )


class Convolution(nn.Module):
    """A convolution as TensorFlow pads it, with ReLU6 where the file has it."""

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int, groups: int, relu: bool
    ) -> None:
        super().__init__()
        out, into, size, _ = weight.shape
        self.convolution = nn.Conv2d(
            into * groups,
            out,
            size,
            stride,
            padding=size // 2 * (stride == 1),
            groups=groups,
        )
        self.convolution.weight.data = weight
        self.convolution.bias.data = bias
        # TensorFlow's "same" pads an even side on the right alone when the stride is 2.
        self.pad = stride == 2
        self.relu = relu

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.convolution(F.pad(inputs, (0, 1, 0, 1)) if self.pad else inputs)
        return F.relu6(outputs, inplace=True) if self.relu else outputs


def convolution(
    model: tflite.Model,
    graph: tflite.SubGraph,
    operator: tflite.Operator,
    depthwise: bool,
) -> Convolution:
    """The convolution of an operator of the file, whose batch norm is already in its weights."""
    options = tflite.DepthwiseConv2DOptions() if depthwise else tflite.Conv2DOptions()
    options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
    weight, bias = (
        dequantized(model, graph, int(index)) for index in operator.InputsAsNumpy()[1:3]
    )
    weight = weight.permute(3, 0, 1, 2) if depthwise else weight.permute(0, 3, 1, 2)
    relu = options.FusedActivationFunction() == tflite.ActivationFunctionType.RELU6
    return Convolution(
        weight.contiguous(),
        bias,
        options.StrideH(),
        len(weight) if depthwise else 1,
        relu,
    )


class Stem(nn.Module):
    """The network from images to its last map of 320 channels, and the classifier behind it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        model = tflite.Model.GetRootAs(Path(path).read_bytes(), 0)
        graph = model.Subgraphs(0)
        self.convolutions = nn.ModuleList()
        # A step is a convolution or, as an `Add` in the file, the sum with the output of an earlier convolution.
        self.steps: list[int | None] = []
        made_by: dict[int, int] = {}
        for position in range(graph.OperatorsLength()):
            operator = graph.Operators(position)
            code = model.OperatorCodes(operator.OpcodeIndex()).DeprecatedBuiltinCode()
            if code in (OPERATORS.CONV_2D, OPERATORS.DEPTHWISE_CONV_2D):
                self.convolutions.append(
                    convolution(
                        model, graph, operator, code == OPERATORS.DEPTHWISE_CONV_2D
                    )
                )
                self.steps.append(None)
            elif code == OPERATORS.ADD:
                self.steps.append(made_by[int(operator.InputsAsNumpy()[1])])
            else:
                continue
            made_by[int(operator.OutputsAsNumpy()[0])] = len(self.steps) - 1
        # The last two convolutions are the classifier's.
        self.steps = self.steps[:-2]

    def forward(self, images: Tensor) -> Tensor:
        """The map (B, 320, 3, 3) of images (B, 3, 96, 96) between -1 and 1."""
        kept = []
        hidden = images
        convolutions = iter(self.convolutions)
        for earlier in self.steps:
            hidden = (
                next(convolutions)(hidden)
                if earlier is None
                else hidden + kept[earlier]
            )
            kept.append(hidden)
        return hidden

    def classify(self, maps: Tensor) -> Tensor:
        """The logits (B, 1001) of the ImageNet classes, the background first."""
        features = self.convolutions[-2](maps).mean((2, 3), keepdim=True)
        return self.convolutions[-1](features).flatten(1)


def load_stem(path: Path) -> Stem:
    """The stem of a tflite file, frozen, in the faster of bfloat16 and float32."""
    dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    stem = Stem(path).requires_grad_(False).eval().to(device(), dtype)
    return stem.to(memory_format=torch.channels_last)
