"""What `gk.fuse` leaves to PyTorch in every family of timm's models: docs/timm.md.

    python -m benchmarks.families [--models NAME ...] [--jobs N] [--limit SECONDS] [--json FILE]

A family is a file of timm's; of each a small model takes a step of `benchmarks.traffic`, on meta tensors,
fused. The bytes of the last backward are those of matrix products and convolutions, of this
package's ops, or of others, which are PyTorch's to run. Those count for the module in whose forward the op
was called that it is a derivative of.
"""

import bisect
import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import gradnorm_kernels as gk
from gradnorm_kernels.diagnose import graph_nodes

from .atlas import Row, first_line, survey_all, table
from .traffic import PHASES, Traffic, gradient_norm_step, prepare

PAGE = Path(__file__).parents[1] / "docs" / "timm.md"
BATCH = 16
# Modules named in a model's row, and in the list over all models.
MOST_OF_A_MODEL, MOST_OF_ALL = 3, 40
# What no module calls: the loss, and the sums that are parameters' gradients.
ELSEWHERE = "elsewhere"
# A small one of every family, and of some that have several architectures. Of a family that is not here,
# the first in timm's list.
MODELS = """
    beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256 halonet26t lambda_resnet26t gernet_s repvgg_a0
    regnetz_b16 regnetz_b16_evos mobileone_s0 resnet50_clip gcresnext26ts bat_resnext26ts cait_xxs24_224
    coat_tiny convit_tiny convmixer_768_32 convnext_atto convnext_atto_rms convnextv2_atto cpubone_nano
    crossvit_tiny_240 csatv2 cspdarknet53 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
    deit3_small_patch16_224 densenet121 dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    efficientnet_b0 mobilenetv2_035 efficientnet_b0_g8_gn efficientvim_m1 efficientvit_b0 efficientvit_m0
    eva02_tiny_patch14_224 vit_medium_patch16_rope_reg1_gap_256 vit_pe_core_tiny_patch16_384
    vit_small_patch16_dinov3 fasternet_t0 fastvit_t8 fastvit_sa12 focalnet_tiny_srf gcvit_xxtiny
    gemma4_vit_167m ghostnet_050 ghostnetv3_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small
    hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
    levit_128s levit_conv_128s lowformer_b0 mambaout_femto coatnet_nano_rw_224 maxvit_pico_rw_256
    maxxvit_rmlp_nano_rw_256 poolformer_s12 convformer_s18 caformer_s18 mixer_s32_224 gmixer_12_224
    resmlp_12_224 gmlp_ti16_224 mobilenetv3_small_050 lcnet_035 mobilenetv4_hybrid_medium_075
    mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny mvitv2_small_cls naflexvit_base_patch16_gap
    naflexvit_base_patch16_map nasnetalarge nest_tiny nextvit_small nfnet_l0 eca_nfnet_l0 pit_ti_224
    pnasnet5large pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m rdnet_tiny regnetx_002 regnety_002 repghostnet_050
    repvit_m0_9 res2net50_26w_4s resnest14d resnet18 resnet50 resnet50_gn seresnet18 ecaresnetlight
    resnetblur18 resnetv2_18 resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_patch16_224
    tresnet_m twins_pcpvt_small twins_svt_small vgg11_bn visformer_tiny vit_tiny_patch16_224
    vit_base_patch16_siglip_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224
    vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_dw
    ese_vovnet39b_evos legacy_xception xception41 xcit_nano_12_p16_224
""".split()  # noqa: SIM905


class Attributed(Traffic):
    """Also knows whose each byte of the last backward is.

    Attributes:
        shares: of ``"products"``, ``"ours"`` and ``"rest"``, the bytes.
        rest: of each (module, op) of the rest, the bytes.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.shares: Counter[str] = Counter()
        self.rest: Counter[tuple[str, str]] = Counter()
        # Autograd numbers its nodes as it makes them: from each of these numbers on they are this module's.
        self._starts = [0]
        self._names = [ELSEWHERE]
        self._calling = [ELSEWHERE]
        for module, name in names.items():
            module.register_forward_pre_hook(functools.partial(self._enter, name))
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, *_: Any) -> None:
        self._calling.append(name)
        self.begin(name)

    def _leave(self, *_: Any) -> None:
        self._calling.pop()
        self.begin(self._calling[-1])

    def begin(self, name: str, *_: Any) -> None:
        self._starts.append(torch.autograd._get_sequence_nr())
        self._names.append(name)

    def follow(self, outputs: Sequence[Tensor]) -> None:
        """From here on what a node of their graph records is of the module that the node is of."""
        for node in graph_nodes(outputs):
            node.register_prehook(functools.partial(self.begin, self._name(node)))

    def _name(self, node: Any) -> str:
        # A node that adds to a parameter's gradient has no number of its own.
        numbered = node is not None and node._sequence_nr() < 2**63
        return (
            self._names[bisect.bisect_right(self._starts, node._sequence_nr()) - 1] if numbered else ELSEWHERE
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counted = len(self.ops)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for moved, flops in self.ops[counted:] if self.phase == PHASES[-1] else ():
            name = func._schema.name
            is_product = flops or name == "aten::linear"
            kind = "ours" if name.startswith("gradnorm_kernels") else "products" if is_product else "rest"
            self.shares[kind] += moved
            if kind == "rest":
                node = torch._C._current_autograd_node()
                self.rest[self._name(node), name.removeprefix("aten::")] += moved
        return result


def count(name: str, fused: bool) -> Attributed:
    """A step of the timm model ``name``."""
    with torch.device("meta"):
        model = timm.create_model(name)
        if not getattr(model, "num_classes", 1):
            model = timm.create_model(name, num_classes=10)
    prepare(model, bn="train")
    traffic = Attributed({module: _short_name(module) for module in model.modules()})
    if fused:
        gk.fuse(model)
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))

    def begin(phase: str) -> None:
        traffic.phase = phase
        traffic.begin(ELSEWHERE)
        if phase == PHASES[1]:
            traffic.follow(outputs)

    images = torch.empty(BATCH, *model.pretrained_cfg["input_size"], device="meta")
    with traffic:
        gradient_norm_step(model, images, torch.empty(BATCH, device="meta", dtype=torch.long), begin)
    return traffic


def _short_name(module: nn.Module) -> str:
    """Of timm's models, whose files have classes of the same name, with the file."""
    kind = type(module)
    return f"{_family(kind)}.{kind.__name__}" if kind.__module__.startswith("timm.models.") else kind.__name__


def _family(kind: Any) -> str:
    return kind.__module__.rpartition(".")[2]


def survey(name: str) -> Row:
    """Of a timm model: bytes of the last backward, fused, and whose they are; or why there are none."""
    row: Row = {"model": name, "family": _family(timm.model_entrypoint(name))}
    try:
        fused = count(name, fused=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return row | {"raises": first_line(error)}
    rest = [{"module": module, "op": op, "bytes": n} for (module, op), n in fused.rest.most_common()]
    return row | {"fuse": fused.shares.total(), "shares": dict(fused.shares), "rest": rest}


def page(machine: Row, rows: Sequence[Row]) -> str:
    """The text of docs/timm.md."""
    counted = [row for row in rows if "fuse" in row]
    families = {row["family"] for row in rows if "family" in row}
    parts = [
        "# Every family of timm's, fused",
        f"Written by `python -m benchmarks.families`: timm {machine['timm']}, torch {machine['torch']},"
        f" commit {machine['commit']}, python {machine['python']}, {machine['date']}.",
        "Bytes of the last backward of one gradient-norm step, counted on meta tensors, float32, BatchNorm in"
        f" train mode, {BATCH} images of the model's own size, after `gk.fuse(model)`. `ours` are those of"
        " this package's ops, `products` of matrix products and convolutions, and `rest` of ops that are left"
        " to PyTorch: sums of gradients, copies, residuals, and formulas that no op of ours covers. The"
        " largest of the rest are named, with their share of all bytes, after the module that the op is a"
        " derivative of.",
        f"{len(rows)} models of {len(families)} families.",
        "## What is left, over all models",
        "The mean share of the bytes, and in how many models it is more than 1%.",
        _left(counted),
        "## Models",
        _models(counted),
        *_not_counted(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _left(rows: Sequence[Row]) -> str:
    shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        for left in row["rest"]:
            shares[left["module"], left["op"]].append(left["bytes"] / row["fuse"])
    ranked = sorted(shares.items(), key=lambda item: -sum(item[1]))[:MOST_OF_ALL]
    lines = [
        [f"{module}, `{op}`", f"{sum(of) / len(rows):.2%}", str(sum(share > 0.01 for share in of))]
        for (module, op), of in ranked
    ]
    return table(["module and op", "mean share", "models"], lines)


def _models(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row["family"], row["model"])):
        fuse = row["fuse"]
        cells = [row["family"], row["model"], f"{fuse / 1e9:.2f}"]
        cells += [f"{row['shares'].get(kind, 0) / fuse:.0%}" for kind in ("ours", "products", "rest")]
        most = [f"{x['module']} `{x['op']}` {x['bytes'] / fuse:.0%}" for x in row["rest"][:MOST_OF_A_MODEL]]
        lines.append([*cells, ", ".join(most)])
    headings = ["family", "model", "GB", "ours", "products", "rest", "most of the rest"]
    return table(headings, lines)


def _not_counted(rows: Sequence[Row]) -> Iterator[str]:
    failed = [row for row in rows if "fuse" not in row]
    if failed:
        yield "## Not counted"
        lines = [[row["model"], row.get("raises") or row["no_result"]] for row in failed]
        yield table(["model", "why"], lines)


def _survey_quietly(name: str) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return survey(name)


def all_models() -> list[str]:
    """Those above that this timm has, and one of each family that none of them is of."""
    names = [name for name in MODELS if timm.is_model(name)]
    known = {_family(timm.model_entrypoint(name)) for name in names}
    return names + [
        timm.list_models(module=family)[0] for family in timm.list_modules() if family not in known
    ]


def main(arguments: list[str] | None = None) -> None:
    # What is imported at first use is then there in every process.
    _survey_quietly("test_vit")
    survey_all(arguments, __doc__, "model", all_models(), timm.list_models(), _survey_quietly, page, PAGE)


if __name__ == "__main__":
    main()
