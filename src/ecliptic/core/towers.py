"""Towers of our own for transformers' `VisionTextDualEncoderModel`: a joined picture tower and a mean-pooled text tower.

Neither backbone of the built-in "offline" model was trained with text. Both towers therefore end in a *description*, three
unit vectors side by side, in which picture and text meet without further training:

- looks: where the picture lies among the pictures of a memory; a text looks up the pictures whose captions resemble it.
- classes: the square roots of class probabilities less their mean over many pictures or texts (without that, every text
  outside the classes resembles every picture that the classifier is unsure of); a text's probabilities come from how close
  it is to each class name.
- names: the average embedding of the names of the likely classes; a text is its own embedding.

`visual_projection` and `text_projection` of the dual encoder then map both descriptions into one joint space. Importing this
module registers both towers, so that `from_pretrained` rebuilds them from a plain config.json and safetensors file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import normalize as unit
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

# EfficientNet-Lite0: (expansion, channels, blocks, kernel, stride) per stage; arXiv 1905.11946 table 1 without squeeze-excite
# and swish, as released by the authors for "lite" ("tpu/models/official/efficientnet/lite").
_LITE0 = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
_LITE0_WIDTH = 1280
_LITE0_STRIDE = 32


class JoinedVisionConfig(PreTrainedConfig):
    """Settings of `JoinedVisionModel`. `hidden_size` is the width of the description, not of the transformer inside."""

    model_type = "joined-vision"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": Dinov2Config}

    backbone_config: Any = None
    image_size: int = 224
    num_classes: int = 1000
    looks: int = 192
    name_size: int = 384
    class_temperature: float = 2.0
    named_classes: int = 20
    weights: Any = (1.0, 1.0, 0.5)
    image_mean: Any = (0.485, 0.456, 0.406)
    image_std: Any = (0.229, 0.224, 0.225)
    affinity_layer: int = 9
    affinity_temperature: float = 0.1
    hidden_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            self.backbone_config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = Dinov2Config(**{k: v for k, v in self.backbone_config.items() if k != "model_type"})
        self.weights = tuple(self.weights)
        self.hidden_size = self.looks + self.num_classes + self.name_size
        super().__post_init__(**kwargs)


class MeanPooledTextConfig(PreTrainedConfig):
    """Settings of `MeanPooledTextModel`. `hidden_size` is the width of the description, not of the transformer inside."""

    model_type = "mean-pooled-text"  # not a word with "clip" in it, which transformers and others take for a family
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": BertConfig}

    backbone_config: Any = None
    memory: int = 1000
    num_classes: int = 1000
    looks: int = 192
    memory_temperature: float = 0.05
    class_temperature: float = 0.03
    weights: Any = (1.0, 1.0, 0.5)
    hidden_size: int = 0
    max_position_embeddings: int = 512
    vocab_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            self.backbone_config = BertConfig()
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = BertConfig(**{k: v for k, v in self.backbone_config.items() if k != "model_type"})
        self.weights = tuple(self.weights)
        self.hidden_size = self.looks + self.num_classes + self.backbone_config.hidden_size
        self.max_position_embeddings = self.backbone_config.max_position_embeddings
        self.vocab_size = self.backbone_config.vocab_size
        super().__post_init__(**kwargs)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ceil(size / stride) outputs, the odd pixel added right and below."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        if rows == columns and rows % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, rows // 2, self.dilation, self.groups)
        padded = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class InvertedBottleneck(nn.Module):
    """Widen, filter each channel, narrow; the input is added where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = SameConv(inputs, width, 1) if expansion > 1 else None
        self.depthwise = SameConv(width, width, kernel, stride, groups=width)
        self.project = SameConv(width, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W), pixels as (value - 127) / 128, -> feature maps (B, 1280, ceil(H / 32), ceil(W / 32)), all >= 0.

    Batch norms are folded into the convolutions: nothing here depends on `train()` or on the rest of the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, outputs, count, kernel, stride in _LITE0:
            for i in range(count):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, _LITE0_WIDTH, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu6(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x))


def rooted(chance: Tensor, centre: Tensor) -> Tensor:
    """Probabilities (..., K) -> unit rows: their square roots (finite slope at 0) less `centre`."""
    return unit((chance + 1e-12).sqrt() - centre, dim=-1)


class DescribePicture(nn.Module):
    """CNN features (..., 1280), >= 0, -> description (..., looks + classes + names)."""

    def __init__(self, config: JoinedVisionConfig):
        super().__init__()
        self.classify = nn.Linear(_LITE0_WIDTH, config.num_classes)
        self.looks = nn.Linear(_LITE0_WIDTH, config.looks)  # whitening of the square roots of the features
        self.names = nn.Linear(config.num_classes, config.name_size, bias=False)
        self.class_centre = nn.Parameter(torch.zeros(config.num_classes))
        self.temperature = config.class_temperature
        self.named = min(config.named_classes, config.num_classes)
        self.weights: Sequence[float] = config.weights

    def forward(self, features: Tensor) -> Tensor:
        # Square roots of averages of relu6: spread like the caption distances, and with a finite slope at 0.
        looks = unit(self.looks((features.clamp_min(0) + 1e-6).sqrt()), dim=-1)
        classes = (self.classify(features) / self.temperature).softmax(-1)
        least = classes.topk(self.named, dim=-1).values[..., -1:]
        names = unit(self.names(classes * (classes >= least)), dim=-1)
        return torch.cat([w * x for w, x in zip(self.weights, (looks, rooted(classes, self.class_centre), names))], -1)


class JoinedVisionModel(PreTrainedModel):
    """A CNN that knows classes and a ViT that knows which patches belong together.

    The pooled vector describes the CNN's averaged features. Patches are on the ViT's grid: the CNN's feature map, brought to
    that grid, is averaged over patches that the ViT finds alike, then described like a picture of its own. So the same
    projection serves both, and a patch can be compared with text. `last_hidden_state` is [pooled, patches].
    """

    config_class = JoinedVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ["Dinov2Layer"]  # noqa: RUF012

    def __init__(self, config: JoinedVisionConfig):
        super().__init__(config)
        self.backbone = Dinov2Model(config.backbone_config)
        self.cnn = EfficientNetLite0()
        self.describe = DescribePicture(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor,
        patches: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """(B, 3, H, W), any size of whole patches, normalised by `image_mean` and `image_std`.

        patches=False leaves the ViT out, eight times faster: `last_hidden_state` is then (B, 1, hidden_size).
        """
        maps = self.cnn(self._for_cnn(pixel_values))
        pooled = self.describe(maps.mean((2, 3)))
        hidden, states, attentions = pooled[:, None], None, None
        if patches or output_hidden_states or output_attentions:
            seen = self.backbone(pixel_values, output_hidden_states=True, output_attentions=bool(output_attentions))
            states, attentions = seen.hidden_states, seen.attentions
            hidden = torch.cat([hidden, self._patches(maps, states, pixel_values.shape[-2:])], 1)
        out = BaseModelOutputWithPooling(
            last_hidden_state=hidden,
            pooler_output=pooled,
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return out.to_tuple() if return_dict is False else out

    def _for_cnn(self, pixels: Tensor) -> Tensor:
        """From this model's normalisation to (value - 127) / 128."""
        mean = pixels.new_tensor(self.config.image_mean)[:, None, None]
        std = pixels.new_tensor(self.config.image_std)[:, None, None]
        return (pixels * std + mean) * (255 / 128) - 127 / 128

    def _patches(self, maps: Tensor, states: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Feature maps (B, 1280, h, w) and ViT states -> patch descriptions (B, N, hidden_size), rows first."""
        side: Any = self.backbone.config.patch_size
        grid = (size[0] // side, size[1] // side)
        local = resample(maps, grid, side, _LITE0_STRIDE).flatten(2).transpose(1, 2)
        alike = unit(states[self.config.affinity_layer][:, -grid[0] * grid[1] :], dim=-1)
        share = (alike @ alike.transpose(1, 2) / self.config.affinity_temperature).softmax(-1)
        return self.describe(share @ local)


def resample(maps: Tensor, grid: tuple[int, int], side: int, stride: int) -> Tensor:
    """Bilinear (B, C, h, w), one cell per `stride` pixels, -> (B, C, *grid), one per `side` pixels, at the same places.

    Not `interpolate`, which would stretch the map: the CNN covers the picture's last, partial cell, and the patches may not.
    """
    x = [
        ((torch.arange(n, device=maps.device) + 0.5) * side / stride / size) * 2 - 1
        for n, size in zip(grid, maps.shape[-2:])
    ]
    rows, columns = torch.meshgrid(x[0], x[1], indexing="ij")
    places = (
        torch.stack([columns, rows], -1).to(maps.dtype).expand(maps.shape[0], -1, -1, -1)
    )  # not len(): a tracer would freeze it
    return F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False)


class DescribeSentence(nn.Module):
    """Sentence embeddings (..., E) of any length -> description (..., looks + classes + E).

    memory_keys (J, E) are embeddings of captions, memory_values (looks, J) the looks of their pictures.
    """

    def __init__(self, config: MeanPooledTextConfig):
        super().__init__()
        width = int(config.backbone_config.hidden_size)
        self.memory_keys = nn.Linear(width, config.memory, bias=False)
        self.memory_values = nn.Linear(config.memory, config.looks, bias=False)
        self.class_keys = nn.Linear(width, config.num_classes, bias=False)
        self.class_centre = nn.Parameter(torch.zeros(config.num_classes))
        self.memory_temperature = config.memory_temperature
        self.class_temperature = config.class_temperature
        self.weights: Sequence[float] = config.weights

    def forward(self, sentence: Tensor) -> Tensor:
        sentence = unit(sentence, dim=-1)
        looks = self.memory_values((self.memory_keys(sentence) / self.memory_temperature).softmax(-1))
        classes = (self.class_keys(sentence) / self.class_temperature).softmax(-1)
        found = (unit(looks, dim=-1), rooted(classes, self.class_centre), sentence)
        return torch.cat([w * x for w, x in zip(self.weights, found)], -1)


class MeanPooledTextModel(PreTrainedModel):
    """A sentence encoder (BERT, mean over the words) whose sentence is then described by what it resembles."""

    config_class = MeanPooledTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["BertLayer"]  # noqa: RUF012

    def __init__(self, config: MeanPooledTextConfig):
        super().__init__(config)
        self.backbone = BertModel(config.backbone_config, add_pooling_layer=False)
        self.describe = DescribeSentence(config)
        self.post_init()

    @property
    def embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    @property
    def encoder(self) -> nn.Module:
        return self.backbone.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Word ids or embeddings -> `last_hidden_state` (B, L, hidden_size), each word described by itself, and the pooled
        description of the masked mean. `hidden_states` are BERT's own."""
        out = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        words = out.last_hidden_state
        mask = words.new_ones(words.shape[:2]) if attention_mask is None else attention_mask.to(words.dtype)
        mean = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        described = BaseModelOutputWithPooling(
            last_hidden_state=self.describe(words),
            pooler_output=self.describe(mean),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return described.to_tuple() if return_dict is False else described


AutoConfig.register(JoinedVisionConfig.model_type, JoinedVisionConfig, exist_ok=True)
AutoConfig.register(MeanPooledTextConfig.model_type, MeanPooledTextConfig, exist_ok=True)
AutoModel.register(JoinedVisionConfig, JoinedVisionModel, exist_ok=True)
AutoModel.register(MeanPooledTextConfig, MeanPooledTextModel, exist_ok=True)
