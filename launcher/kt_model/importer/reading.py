"""Imports one adapter folder into its normal form: opens files, passes every key to its format, counts it, checks
values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kt_model.adapters import AUTO_LAYOUT
from kt_model.checkpoint import Checkpoint, require_folder
from kt_model.errors import Problems, shown
from kt_model.importer import fused, kt_training, per_expert, stacked
from kt_model.importer.base_match import check_fit
from kt_model.importer.files import weight_files
from kt_model.importer.layouts import Order, find_marks
from kt_model.importer.mistakes import SAME_MODULE, Mistakes
from kt_model.importer.names import WHOLE, Key, read_key
from kt_model.importer.normal import Imported, Pair
from kt_model.importer.settings import Settings, read_settings
from kt_model.importer.stray_files import left_over
from kt_model.importer.trained_on import differences
from kt_model.importer.whole_embeddings import check_copies
from kt_model.jsonfile import read_json
from kt_model.tensors.stored import BFLOAT16_MAX, DTYPES, HELD_BYTES, Stored, open_tensors
from kt_model.training import ADAPTER_CONFIG, require_adapter

EXAMPLE = "base_model.model.model.layers.1.mlp.experts.0.gate_proj.lora_A.weight"
UNGATHERED = "as DeepSpeed ZeRO-3 leaves them when it saves without gathering"
GATHER = (
    "Set stage3_gather_16bit_weights_on_model_save to true in DeepSpeed's configuration, or train with transformers 5, "
    "and save again; what was trained is still in the checkpoint's global_step folder, which zero_to_fp32.py reads."
)
FLAT = "as FSDP and DeepSpeed keep shards while they train"
GATHER_FLAT = "Save it again from the gathered model (FSDP: the FULL_STATE_DICT type)."

FORMATS: Mapping[str, str] = {
    "A": "per expert",
    "B": "PEFT target_parameters on fused experts",
    "C": "PEFT target_parameters, converted from gate/up/down",
    "D": "KT training output",
    "E": "experts stacked in three dimensions",
}


def import_adapter(
    folder: Path, base: Checkpoint | None = None, *, where: str = "lora.path", layout: str = AUTO_LAYOUT
) -> Imported:
    """The normal form. Mistakes inside the files are in `.problems`; `where` is the key that names the folder.

    layout: the order of B's columns in fused experts, as in lora.layout.
    """
    require_folder(folder, where, "an adapter")
    require_adapter(folder, where)
    config = read_json(folder / ADAPTER_CONFIG, where)
    reading = _Reading(folder, base, where, layout, find_marks(folder, config))
    settings = read_settings(where, config, reading.problems)
    files = weight_files(folder, where)
    reading.warn_of_leftovers([file.name for file in files])
    if base is not None:
        reading.warnings += differences(folder, config, base)
    for file in files:
        with reading.problems.collect():
            reading.open(file)
    if settings is not None and not reading.problems.errors:
        reading.read(settings)
    return reading.result(settings)


class _Reading:
    """One import in progress."""

    def __init__(self, folder: Path, base: Checkpoint | None, where: str, layout: str, marks: tuple[str, ...]) -> None:
        self.folder = folder
        self.base = base
        self.where = where
        self.layout = layout
        self.marks = marks
        self.order: Order | None = None
        self.problems = Problems()
        self.mistakes = Mistakes()
        self.warnings: list[str] = []
        self.pairs: dict[str, Pair] = {}
        self.counts: Counter[str] = Counter()
        self.refused: list[tuple[str, str]] = []
        self.stored: dict[str, Stored] = {}
        self.keys: list[Key] = []
        self.kt_tensors: dict[str, Stored] = {}
        self.copies: dict[str, tuple[str, Stored]] = {}

    def warn_of_leftovers(self, read: Sequence[str]) -> None:
        """One warning for all of them."""
        if unread := left_over(self.folder, read):
            what = f"{', '.join(unread)} {'look' if len(unread) > 1 else 'looks'} like weights and"
            note = f"{what} {'are' if len(unread) > 1 else 'is'} not read; the adapter is {' and '.join(read)}"
            self.warnings.append(note)

    def open(self, path: Path) -> None:
        """Map a file and sort its keys; every key is counted here, once."""
        for text, stored in open_tensors(path):
            if isinstance(stored, str):
                kind = f"{{count}} tensors of dtype {stored}, expected one of {', '.join(DTYPES)}"
                self._refuse(text, f"dtype {stored}", kind, "Save the adapter in bfloat16.")
            elif 0 in stored.shape:
                self._refuse(
                    text, "no values", f"{{count}} tensors without values in {path.name}, {UNGATHERED}", GATHER
                )
            elif path.name == kt_training.FILE and kt_training.KEY.fullmatch(text):
                self.kt_tensors[text] = stored
                self.counts["routed_experts"] += 1
            else:
                self._sort(path.name, text, stored)

    def _sort(self, file: str, text: str, stored: Stored) -> None:
        key = read_key(text)
        if isinstance(key, str):
            self._refuse(text, key, f"{{count}} {key} in {file}", f"Expected are names like {EXAMPLE}.")
        elif key.side == WHOLE:
            self.counts[key.target.kind] += 1
            self._keep_copy(key, stored)
        elif len(stored.shape) == 1:
            self._refuse(text, "one dimension", f"{{count}} tensors of one dimension in {file}, {FLAT}", GATHER_FLAT)
        else:
            self.counts[key.target.kind] += 1
            self.keys.append(key)
            self.stored[text] = stored

    def _refuse(self, text: str, why: str, kind: str, fix: str) -> None:
        self.refused.append((text, why))
        self.mistakes.add(kind, text, fix)

    def _keep_copy(self, key: Key, stored: Stored) -> None:
        for other, (module, _) in self.copies.items():
            if module == key.module:
                self.mistakes.add(SAME_MODULE, f"{other} and {key.text}")
        self.copies[key.text] = (key.module, stored)

    def read(self, settings: Settings) -> None:
        """All pairs of all formats; problems are collected."""
        if settings.unknown:
            note = f"adapter_config.json has unknown keys, which are not read: {', '.join(settings.unknown)}"
            self.warnings.append(note)
        self._check_values()
        with self.problems.collect():
            self._read_modules(settings)
        self._add(kt_training.read_pairs(self.kt_tensors, settings, self.mistakes))
        if not (self.pairs or self.mistakes or self.problems.errors):
            self._complain_of_nothing()
        if self.base is not None:
            check_fit(self.pairs.values(), self.base, self.mistakes)
        if self.copies and self.base is not None:
            check_copies(self.copies, self.base, self.mistakes)
        elif self.copies:
            self.warnings.append(f"{shown(list(self.copies))} cannot be compared with the base, since none is given")
        self._check_expert_sizes()
        self._check_range()
        self._warn_of_zeros()

    def _complain_of_nothing(self) -> None:
        if self.copies:
            self.problems.add(self.where, f"{self.folder} holds no low-rank tensors", "Save the adapter again.")
        else:
            self.problems.add(self.where, f"the files of {self.folder} hold no tensor at all, {UNGATHERED}", GATHER)

    def _read_modules(self, settings: Settings) -> None:
        wrapped = []
        for (module, _), sides in self._sides().items():
            if set(sides) != {"A", "B"}:
                kind = "A without B" if "A" in sides else "B without A"
                self.mistakes.add(kind, module, "Copy the whole file again.")
                continue
            key, a, b = sides["A"], self.stored[sides["A"].text], self.stored[sides["B"].text]
            if key.stacked:
                self._add(stacked.read_pairs(module, key.peft_module, key.target, a, b, settings, self.mistakes))
            elif not key.fused:
                self._add(per_expert.read_pair(key, a, b, settings, self.mistakes))
            elif len(a.shape) == len(b.shape) == 2:
                wrapped.append(fused.Wrapped(key, a, b))
            else:
                got = f"{module} has A {list(a.shape)} and B {list(b.shape)}"
                self.mistakes.add("tensors that are not a low-rank pair", f"{got}, expected two dimensions each")
        if wrapped and not self.mistakes:
            sizes = fused.Sizes(self.base.hidden_size, self.base.moe_intermediate_size) if self.base else None
            experts = self.base.num_experts if self.base else None
            context = fused.FileContext(self.where, settings, self.layout, self.marks, sizes, experts)
            pairs, self.order = fused.read_pairs(context, wrapped, self.warnings)
            self._add(pairs)

    def _sides(self) -> dict[tuple[str, int], dict[str, Key]]:
        """Module -> its A and B; two keys for one side are a mistake."""
        sides: dict[tuple[str, int], dict[str, Key]] = {}
        for key in self.keys:
            found = sides.setdefault((key.module, key.inner), {})
            if key.side in found:
                self.mistakes.add(SAME_MODULE, f"{found[key.side].text} and {key.text}")
            found[key.side] = key
        return sides

    def _add(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            other = self.pairs.get(pair.target.module)
            if other is not None:
                both = f"{other.source} and {pair.source}"
                self.mistakes.add("modules that appear twice, in two formats", both, "Keep one of them.")
            self.pairs[pair.target.module] = pair

    def _check_values(self) -> None:
        read_bytes = 0
        for text, stored in {**self.stored, **self.kt_tensors}.items():
            if not stored.is_finite():
                self.mistakes.add("NaN or infinity", text, "Train or save it again.")
            read_bytes += stored.array.nbytes
            if read_bytes > HELD_BYTES:
                stored.forget()
                read_bytes = 0

    def _check_expert_sizes(self) -> None:
        """All experts' pairs of one projection must have the same size, with or without a base."""
        sizes: dict[str, set[tuple[int, int]]] = {}
        for pair in self.pairs.values():
            if pair.target.kind == "routed_experts":
                sizes.setdefault(pair.target.projection, set()).add((pair.out_features, pair.in_features))
        for projection, found in sizes.items():
            if len(found) > 1 and self.base is None:
                named = shown([str(list(size)) for size in sorted(found)])
                self.mistakes.add("experts of different sizes", f"{projection} {named}")

    def _check_range(self) -> None:
        """A and B times its scale are served in bfloat16; an infinity there would make every logit NaN."""
        for pair in self.pairs.values():
            if max(pair.a.largest(), pair.b.largest() * abs(pair.scale)) > BFLOAT16_MAX:
                kind = "{count} modules beyond the range of bfloat16, in A or in B times its scale"
                self.mistakes.add(kind, pair.source, "Train it again with a smaller learning rate or alpha.")

    def _warn_of_zeros(self) -> None:
        zero = [pair.source for pair in self.pairs.values() if pair.b.is_zero()]
        if self.pairs and not any(pair.scale for pair in self.pairs.values()):
            self.warnings.append("lora_alpha is zero: the adapter does nothing")
        elif zero and len(zero) == len(self.pairs):
            self.warnings.append("every B is zero: the adapter does nothing, as before its training")
        elif zero:
            self.warnings.append(f"B is zero in {len(zero)} of {len(self.pairs)} modules: {shown(zero)}")

    def result(self, settings: Settings | None) -> Imported:
        self.mistakes.tell(self.where, self.problems)
        copies = [stored for _, stored in self.copies.values()]
        tensors = [*self.stored.values(), *self.kt_tensors.values(), *copies]
        return Imported(
            path=self.folder,
            format=self._format(settings),
            pairs=self.pairs,
            keys=dict(self.counts),
            refused=tuple(self.refused),
            alpha=settings.alpha if settings else 0.0,
            rank_stabilized=bool(settings and settings.rank_stabilized),
            order=self.order,
            bytes=sum(stored.array.nbytes for stored in tensors),
            warnings=tuple(self.warnings),
            problems=tuple(self.problems.errors),
        )

    def _format(self, settings: Settings | None) -> str:
        if self.kt_tensors:
            return "D"
        if any(key.stacked for key in self.keys):
            return "E"
        if settings is None or not any(key.fused for key in self.keys):
            return "A"
        converted = any("gate_up_proj" in pattern for pattern in settings.rank_pattern)
        return "C" if converted and not any("." in name for name in settings.target_parameters) else "B"
