"""Studies on disk: which layout a folder has, and its studies with their patients and labels.

    find_cases                          a folder in any layout of docs/data.md -> [Case]
    LAYOUTS                             a function per layout: names of files -> [Case]
    read_splits                         the user's own folds
    read_dataset_json, patient_of       what dataset.json and the names of studies say

To find studies, only names and dataset.json are read, and label files if nothing names their codes.
"""

import contextlib
import errno
import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from files import UserError, note, printable, read_json, read_nifti, size_and_sample


@dataclass(frozen=True)
class Case:
    """One study. images: (CT or None, PET); brain: (file of all channels,) or (T2w, FLAIR)."""

    name: str
    patient: str
    images: tuple[Path | None, ...]
    label: Path | None
    channels: tuple[int, ...] = ()  # brain, one file: which channels are T2w and FLAIR
    roles: tuple[tuple[int | None, str], ...] = ()  # label code -> one of ROLES; None: the others
    own_grid: bool = False  # whether the label may be on another grid than the last image

    def files(self) -> list[Path]:
        """The files of this study that exist."""
        return [path for path in (*self.images, self.label) if path and os.path.isfile(path)]


ROLES = {"tumor": 1, "edema": 1, "core": 2, "none": 0}  # of a label code -> `read_label`
MSD = tuple(enumerate(("edema", "core", "core"), 1))
BRATS = tuple(enumerate(("core", "edema", "core", "core"), 1))  # enhancing: 4, from 2023 on 3
BRATS_2023 = (*BRATS[:3], (4, "none"))  # the resection cavity
BRATS_PEDS = tuple(enumerate(("core", "core", "core", "edema"), 1))  # from 2024 on
WORDS = {  # in the names of brain labels, in this order
    "edema": r"edema|peritumou?r|hyperintens|\b(ed|snfh)\b",
    "none": r"cavity|\brc\b",
    "core": r"tumou?r|core|enhanc|necro|cyst|\b(ncr|net|netc|et|tc|cc)\b",
}


def find_cases(
    root, task: str, complete: bool = True, patient_regex: str = "", label_values: tuple = ()
) -> tuple[list[Case], str]:
    """Find the studies of a folder in any layout of docs/data.md.

    Args:
        task: "petct" or "brain".
        complete: True for training. For prediction, CT and truth may be missing (None), and
            imagesTs is searched, too.
        patient_regex: what it matches of a study's name (or its first group) is the patient.
        label_values: PET/CT: the values of the truth that mean tumor, and others do not; None means
            all but 0.

    Returns the studies and a line about them. Raises UserError if there are none, for missing
    files, for two studies of one name, and for labels of unknown meaning.
    """
    root = Path(root)
    folders = find_images(root)
    if complete and root.name != "imagesTs":
        folders = {f: names for f, names in folders.items() if f.name != "imagesTs"}
    layout, cases = "", []
    for name, find in LAYOUTS[task].items():
        if not cases:
            layout, cases = name, find(root, folders, task, complete)
    if not cases:
        count = sum(map(len, folders.values()))
        first = f", as in {next(iter(folders))}" if folders else ""
        wanted = "SUV.nii.gz" if task == "petct" else "dataset.json"
        advice = f"expected {wanted} or another layout of docs/data.md"
        raise UserError(f"{root}: no studies in its {count} NIfTI files{first}; {advice}")
    roles = tuple((value, "tumor") for value in label_values)
    if roles and None not in label_values:
        roles = ((None, "none"), *roles)
    if roles and task == "brain":
        raise UserError("--label-values, --label-nonzero: only for PET/CT, which has one label")
    if not roles and layout in ("nnU-Net", "MSD"):
        try:
            roles = _roles(read_dataset_json(root), task)
            if task == "brain" and not roles:
                roles = _roles_by_codes(cases)
        except UserError as e:
            if complete:
                raise
            note(f"without scores, which need the meaning of labels: {e}")
            roles = ((0, "none"),)
    named: dict[str, Case] = {}
    for case in cases:
        name = safe_name(case.name)
        if name in named:
            pair = f"{named[name].images[-1]} and {case.images[-1]}"
            problem = f"both would be study {name} and have one mask"
            raise UserError(f"{pair}: {problem}; rename one, or give --root the folder of one")
        patient = patient_of(printable(case.name), patient_regex) or case.patient or case.name
        case = replace(case, name=name, patient=safe_name(patient), roles=roles or case.roles)
        if not (layout == "MSD" and complete):  # what dataset.json lists is found missing later
            case = _without_missing(case, task, complete)
        named[name] = case
    patients = len({case.patient for case in named.values()})
    studies = "1 study" if len(named) == 1 else f"{len(named):,} studies"
    people = "1 patient" if patients == 1 else f"{patients:,} patients"
    return [*named.values()], f"{layout} layout: {studies} of {people}"


def find_petct(root, complete: bool = True) -> list[Case]:
    """The studies that `find_cases` finds for PET/CT."""
    return find_cases(root, "petct", complete)[0]


def find_brain(root, complete: bool = True) -> list[Case]:
    """The studies that `find_cases` finds for brain MR."""
    return find_cases(root, "brain", complete)[0]


def refuse_duplicates(cases: list[Case]) -> None:
    """Raise UserError if two cases have one name or the same files: folds could separate them."""
    seen = {}
    for case in cases:
        image = case.images[-1]
        sample = tuple(size_and_sample(path) for path in case.files())
        keys = {case.name: f"case {case.name} occurs twice", sample: "one study under two names"}
        for key, problem in keys.items():
            if key and key in seen:
                raise UserError(f"{problem}: {seen[key]} and {image}; remove one of the two")
            seen[key] = image


def find_splits(root) -> Path | None:
    """The folds that come with a data set in nnU-Net's layout, or None."""
    path = Path(root) / "splits_final.json"
    return path if os.path.lexists(path) else None


def read_splits(path, cases) -> list[dict[str, list[str]]]:
    """Read the user's own folds: a JSON list of {"train": names, "val": names}.

    A name is a case's or a patient's; the names of the cases are returned. Raises UserError for
    another format, unknown names, an empty side of a fold, and a patient on both sides.
    """
    form = 'a JSON list of {"train": [names], "val": [names]}'
    try:
        folds = read_json(path, form)
        folds = [{s: list(map(safe_name, f[s])) for s in ("train", "val")} for f in folds]
    except (KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: expected {form} ({e!r:.80})") from None
    if not folds:
        raise UserError(f"{path}: no folds")
    patient_of = {case.name: case.patient for case in cases}
    cases_of: dict[str, list[str]] = {}  # the name of a patient or a case -> names of cases
    for case in cases:
        cases_of.setdefault(case.patient, []).append(case.name)
    cases_of |= {name: [name] for name in patient_of}
    for i, fold in enumerate(folds):
        unknown = [name for name in fold["train"] + fold["val"] if name not in cases_of]
        if unknown:
            problem = f"fold {i} names {unknown[:3]}, which the data does not hold"
            raise UserError(f"{path}: {problem} (it has {list(patient_of)[:3]}, ...)")
        for side, names in fold.items():
            fold[side] = sorted({case for name in names for case in cases_of[name]})
        train = {patient_of[name] for name in fold["train"]}
        val = {patient_of[name] for name in fold["val"]}
        if train & val:
            problem = f"fold {i} has {sorted(train & val)[:3]} in training and validation"
            raise UserError(f"{path}: {problem}: scores would be too good; give other --splits")
        if not train or not val:
            raise UserError(f"{path}: fold {i} has an empty side")
    return folds


# ----------------------------------------------------------------------------------------- layouts
def _without_missing(case: Case, task: str, complete: bool) -> Case:
    """Replace files that are missing by None if they may be; UserError if they may not."""
    paths = (*case.images, case.label)
    missing = [path for path in paths if path and not os.path.isfile(path)]
    if missing and complete:
        needs = "T2w, FLAIR" if task == "brain" else "PET, CT"
        raise UserError(f"{missing[0]}: missing; to train, a study needs {needs} and truth")
    needed = case.images if task == "brain" else case.images[1:]  # missed when they are read
    *images, label = (p if p in needed or p not in missing else None for p in paths)
    return replace(case, images=tuple(images), label=label)


def _autopet(root: Path, folders, *_) -> list[Case]:
    """PATIENT/STUDY/{SUV, CTres, SEG}.nii.gz, at any depth."""
    cases = []
    for folder, _, files in group_images(folders, "()(suv|ctres|ct|seg)"):
        if "suv" in files or "ctres" in files:
            parts = folder.relative_to(root).parts or (root.resolve().name,)
            patient = "__".join(parts[:-1] or parts)
            ct = files.get("ctres") or files.get("ct") or folder / "CTres.nii.gz"
            suv = files.get("suv") or folder / "SUV.nii.gz"
            seg = files.get("seg") or folder / "SEG.nii.gz"
            cases.append(Case("__".join(parts), patient, (ct, suv), seg))
    return cases


def _hecktor(root: Path, folders, *_) -> list[Case]:
    """CASE__CT.nii.gz and CASE__PT.nii.gz; both labels, 1 and 2, are tumor."""
    cases = []
    roles = ((1, "tumor"), (2, "tumor"))
    for folder, name, files in group_images(folders, "(.+)__(ct|pt)"):
        ct = files.get("ct") or folder / f"{name}__CT.nii.gz"
        pet = files.get("pt") or folder / f"{name}__PT.nii.gz"
        label = truth_of(folder, name)  # on the CT's grid
        cases.append(Case(name, "", (ct, pet), label, roles=roles, own_grid=True))
    return cases


def _brats(root: Path, folders, *_) -> list[Case]:
    """CASE_flair, _t2, _seg.nii.gz (2020, 2021), or CASE-t2f, -t2w, -seg.nii.gz (from 2023 on)."""
    cases = []
    channels = "flair|t1|t1ce|t2|t2f|t1n|t1c|t2w|seg"
    for folder, name, files in group_images(folders, f"(.+)[-_]({channels})"):
        old = any(channel in files for channel in ("flair", "t1", "t1ce", "t2"))
        names = ("_t2", "_flair", "_seg") if old else ("-t2w", "-t2f", "-seg")
        *images, seg = (files.get(n[1:]) or folder / f"{name}{n}.nii.gz" for n in names)
        roles = BRATS if old else BRATS_2023
        if {*files} != {"seg"}:
            cases.append(Case(name, "", tuple(images), seg, roles=roles))
    peds = [case for case in cases if case.name.lower().startswith("brats-ped")]
    if 4 in _codes(peds):
        cases = [replace(c, roles=BRATS_PEDS) if c in peds else c for c in cases]
    return cases


def _nnunet(root: Path, folders, task: str, _) -> list[Case]:
    """imagesTr/CASE_0000.nii.gz, _0001, ..., labelsTr/CASE.nii.gz; or one of these folders."""
    groups = group_images(image_folders(root, folders), r"(.+)_(\d{4})")
    if task == "brain" and not any("0000" in files for _, _, files in groups):
        return []  # MSD's BRATS_1000.nii.gz, for example
    cases = []
    numbers = _channels(read_dataset_json(root), task) if groups else ()
    for folder, name, files in groups:
        paths = {f"{n:04}": folder / f"{name}_{n:04}.nii.gz" for n in numbers}
        images = tuple(files.get(n) or path for n, path in paths.items())
        cases.append(Case(name, "", images, truth_of(folder, name)))
    return cases


def _msd(root: Path, folders, _, complete: bool) -> list[Case]:
    """Images of four channels that dataset.json lists, or that are in imagesTr or root."""
    info = read_dataset_json(root)
    pairs = list(info.training)
    others = [f / name for f, names in image_folders(root, folders).items() for name in names]
    if pairs:
        others = [path for path in others if path.parent.name == "imagesTs"]
    tests = [] if complete else [path for path in info.tests if os.path.isfile(path)]
    pairs += [(path, truth_of(path.parent, stem(path))) for path in dict.fromkeys(tests + others)]
    if info.path and not pairs:
        raise UserError(f'{info.path}: "training" lists no cases')
    channels = _channels(info, "brain")
    return [Case(stem(image), "", (image,), label, channels) for image, label in pairs]


LAYOUTS = {
    "petct": {"AutoPET": _autopet, "nnU-Net": _nnunet, "HECKTOR": _hecktor},
    "brain": {"BraTS": _brats, "nnU-Net": _nnunet, "MSD": _msd},
}


# ------------------------------------------------------------------------------ what names mean
class DatasetJson(NamedTuple):
    """What the dataset.json of a data set in MSD's or nnU-Net's layout says."""

    path: Path | None  # None if there is no such file
    channels: list[tuple[int, str]]  # number and name, in lower case
    labels: list[tuple[str, list[int]]]  # name and codes; without the background
    training: list[tuple[Path, Path]]  # image and label
    tests: list[Path]


def read_dataset_json(root: Path) -> DatasetJson:
    """Read root/dataset.json; of a root like imagesTs, that of the folder above, but no lists.

    Raises UserError if it is of another form.
    """
    part = root.name.startswith("images")
    path = (root.parent if part else root) / "dataset.json"
    if not os.path.lexists(path):
        return DatasetJson(None, [], [], [], [])
    form = '"training": [{"image": ..., "label": ...}] and names of channels and labels by number'
    meta = read_json(path, form)
    try:
        names = meta.get("channel_names") or meta.get("modality") or {}
        channels = [(_natural(k), str(name).lower()) for k, name in names.items()]
        labels = []
        for key, value in meta.get("labels", {}).items():
            if isinstance(value, str):  # MSD, nnU-Net v1: code -> name; v2: name -> code or codes
                key, value = value, key
            codes = [_natural(code) for code in (value if isinstance(value, list) else [value])]
            labels += [(key, [code for code in codes if code])] if any(codes) else []
        pairs = meta.get("training", [])
        training = [(path.parent / pair["image"], path.parent / pair["label"]) for pair in pairs]
        tests = [item if isinstance(item, str) else item["image"] for item in meta.get("test", [])]
        tests = [path.parent / item for item in tests]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: expected {form} ({type(e).__name__}: {e!s:.80})") from None
    return DatasetJson(path, channels, labels, [] if part else training, [] if part else tests)


def _natural(number) -> int:
    if not re.fullmatch("[0-9]{1,9}", str(number)):
        raise ValueError(f"{number!s:.20} is not a number")
    return int(number)


def _channels(info: DatasetJson, task: str) -> tuple[int, int]:
    """The numbers of CT and PET, or of T2w and FLAIR. Raises UserError."""
    names = info.channels
    if task == "petct":
        pet = next((i for i, name in names if re.search(r"pet|suv|\bpt\b", name)), 1)
        ct = [i for i, name in names if re.search(r"\bct", name) and i != pet]
        return (ct[0] if ct else int(pet == 0)), pet
    flair = [i for i, name in names if re.search("flair|t2f", name)]
    t2w = [i for i, name in names if "t2" in name and i not in flair]
    if names and not (flair and t2w):
        raise UserError(f"{info.path}: its channels {names!s:.200} name no T2w and FLAIR")
    return (t2w[0], flair[0]) if names else (3, 0)


def _roles(info: DatasetJson, task: str) -> tuple:
    """What the codes mean by their names; () if none are given. Raises UserError for others."""
    roles = {}
    for name, codes in sorted(info.labels, key=lambda item: -len(item[1])):  # whole before core
        word = re.sub("[^a-z]+", " ", name.lower())
        if task == "petct":
            advice = "say which labels are tumor with --label-values"
            known = re.search("tumou?r|lesion|cancer|metasta|gtv", word)
            role = "tumor" if known or len(info.labels) == 1 else None
        else:
            advice = 'call them "edema" and "core" or "tumor" (docs/data.md)'
            role = next((r for r, pattern in WORDS.items() if re.search(pattern, word)), None)
            if "whole" in word:  # of a region's codes, those that are in no smaller region
                role = "edema" if len(codes) > 1 else None
        if role is None:
            raise UserError(f'{info.path}: "labels": {name!r} has no known meaning; {advice}')
        roles |= dict.fromkeys(codes, role)
    return tuple(roles.items())


def _codes(cases: list[Case]) -> dict[float, Path]:
    """Every code in the truths of these cases, with a file that has it."""
    found = {}
    for case in tqdm(cases, "label codes", unit="case", leave=False, disable=not cases):
        with contextlib.suppress(UserError):  # an error when it is used
            labels = np.asarray(read_nifti(case.label, air=None).dataobj)
            found |= dict.fromkeys(np.unique(labels[labels != 0]).tolist(), case.label)
    return found


def _roles_by_codes(cases: list[Case]) -> tuple:
    """What codes without names mean, from all files together: BraTS's if 4 occurs, else MSD's."""
    codes = _codes(cases)
    if 3 in codes and 4 in codes:
        problem = f"label 3 in {codes[3]} and 4 in {codes[4]}: neither MSD's codes nor BraTS's"
        raise UserError(f'{problem}; name them in dataset.json ("labels")')
    return BRATS if 4 in codes else MSD


# ------------------------------------------------------------------------------- names and folders
ENDING = re.compile(r"\.nii(\.gz)?\Z", re.IGNORECASE)


def stem(path) -> str:
    """The name of a NIfTI file without .nii or .nii.gz."""
    return ENDING.sub("", Path(path).name)


def study_of(image: Path) -> str:
    """The name of a study by that of its PET or FLAIR: CASE_0001.nii.gz; SUV.nii.gz: its folder."""
    match = re.fullmatch("(?:(.*?)[-_]+)?(?:suv|pet|pt|image|flair|t2f|0001)", stem(image), re.I)
    name = match[1] if match else stem(image)
    return safe_name(name or Path(os.path.abspath(image)).parent.name)


def safe_name(name) -> str:
    """A study's name as the name of files: printable, and shortened if they would be too long."""
    name = printable(name)
    if not name.strip("."):  # "." and ".." are folders
        name = f"study{name}"
    if len(name.encode()) <= 200:  # of the 255 bytes that file systems take
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[:180].decode(errors="ignore") + "-" + digest


DATE = (
    r"\d{4}-\d\d-\d\d|\d\d-\d\d-\d{4}"
    r"|(?:19|20)\d\d[._][01]\d[._][0-3]\d(?!\d)|[0-3]\d[._][0-3]\d[._](?:19|20)\d\d(?!\d)"
    r"|(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"
)
VISIT = r"(?:visit|ses|session|timepoint|tp|baseline|followup)-?\d{0,3}(?![a-z0-9])"
PATIENTS = (  # group 1 of a study's name is the patient
    r"((?:fdg|psma)_[^_]+)_.+",  # AutoPET II to V
    r"(brats-.+-\d+)-\d{1,3}",  # BraTS 2023 and later
    rf"(.+?)[_-]+(?:{DATE}|{VISIT}).*",  # also the folders PATIENT/DATE/SERIES
)


def patient_of(name: str, regex: str = "") -> str:
    """The patient in a study's name: what `regex` matches, or its first group, or by PATIENTS.

    "" if none of the patterns fits. Raises UserError if the regex is invalid or does not match.
    """
    if not regex:
        found = (re.fullmatch(pattern, name, re.IGNORECASE) for pattern in PATIENTS)
        return next((match[1] for match in found if match), "")
    try:
        match = re.search(regex, name)
    except re.error as e:
        raise UserError(f"--patient-regex {regex}: not a regular expression: {e}") from None
    if not (match and match[0]):
        raise UserError(f"--patient-regex {regex}: matches nothing of the study {name}")
    return match[min(1, len(match.groups()))] or match[0]


def find_images(root) -> dict[Path, list[str]]:
    """The names of the NIfTI files in each folder below root, in order; at any depth.

    Symbolic links are followed, but not to folders that are found anyway, as they lie below root,
    or that contain the link. Raises UserError for a folder that is missing or cannot be read.
    """
    root = Path(root)
    found: dict[Path, list[str]] = {}
    stack = [root]
    while stack:
        folder = stack.pop()
        try:
            for entry in os.scandir(folder):
                if _is_folder(entry):
                    if not (entry.is_symlink() and _leads_back(Path(entry.path), root)):
                        stack.append(Path(entry.path))
                elif ENDING.search(entry.name) and not entry.name.startswith("."):
                    found.setdefault(folder, []).append(entry.name)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder}: no such folder") from None
        except OSError as e:
            problem = f"{folder}: cannot be read: {e.strerror}"
            raise UserError(f"{problem}; allow reading it, or move it away") from None
    return {folder: sorted(found[folder]) for folder in sorted(found)}


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as e:
        if e.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _leads_back(link: Path, root: Path) -> bool:
    """Whether a link leads to a folder below root, or to one that contains the link."""
    target = Path(os.path.realpath(link))
    if target.is_relative_to(os.path.realpath(root)):
        return True
    above = [path for path in link.parents if path.is_relative_to(root)]
    return any(Path(os.path.realpath(path)).is_relative_to(target) for path in above)


def group_images(folders, pattern: str) -> list[tuple[Path, str, dict[str, Path]]]:
    """Group `find_images`'s files that fit a pattern: [(folder, case, {channel: path})].

    pattern: of a file's stem; its groups are the case and the channel, which is lower case in the
    result. Raises UserError for two files of one channel (of a case that has a name).
    """
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for folder, names in folders.items():
        for name in names:
            match = re.fullmatch(pattern, stem(name), re.IGNORECASE | re.DOTALL)
            if not match:
                continue
            files = groups.setdefault((folder, match[1]), {})
            channel = match[2].lower()
            if match[1] and channel in files:
                raise UserError(f"{files[channel]} and {name}: one image twice; remove one")
            files[channel] = folder / name
    return [(folder, case, files) for (folder, case), files in groups.items()]


def image_folders(root: Path, folders: dict[Path, list[str]]) -> dict[Path, list[str]]:
    """Those of `find_images`'s folders that are root or, like imagesTr, directly in it."""
    used = [f for f in folders if f == root or (f.parent == root and f.name.startswith("images"))]
    return {folder: folders[folder] for folder in used}


def truth_of(folder: Path, name: str) -> Path:
    """The label file of a study: in labelsTr next to imagesTr (Ts: alike), or next to its images.

    Without one, the path that it should have.
    """
    folder = folder.parent / folder.name.replace("images", "labels")
    paths = [folder / f"{name}{ending}" for ending in (".nii.gz", ".nii", ".NII.GZ", ".NII")]
    return next((path for path in paths if os.path.isfile(path)), paths[0])
