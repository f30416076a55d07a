"""`pip install .` makes one package, `mirrorunet`, of the flat files of this repository.

Here, the files import each other by their bare names (`import kernels`, `from data import Case`).
Installed like that, `data` or `train` would collide with other people's modules. So the build
copies them into one package and gives their imports its name: `from mirrorunet import kernels`,
`from mirrorunet.data import Case`. The result is plain Python without import hooks.
"""

import re
import tempfile
from pathlib import Path

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # only a build needs it
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent
PACKAGE = "mirrorunet"
INIT = '''"""Mirror U-Net, installed: tumor segmentation in PET/CT and brain MR.

>>> from mirrorunet import load_model, predict_study
>>> from mirrorunet.mirror_unet import MirrorUNet
>>> from mirrorunet.losses import MirrorLoss, dice_ce
>>> from mirrorunet import kernels
"""

_PUBLIC = {
    "MirrorUNet": "mirror_unet", "from_official": "mirror_unet",
    "MirrorLoss": "losses", "dice_ce": "losses",
    "load_model": "predict", "predict_study": "predict",
}


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mirrorunet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mirrorunet.{_PUBLIC[name]}"), name)
'''


def write_package(folder: Path) -> None:
    """Write the package's files into `folder`, their imports changed to the package's name."""
    sources = [p for p in ROOT.glob("*.py") if p != Path(__file__).resolve()]
    sources += (ROOT / "kernels").glob("*.py")
    names = "|".join([p.stem for p in sources if p.parent == ROOT] + ["kernels"])
    for path in sources:
        text = path.read_text()
        text = re.sub(rf"(?m)^(\s*)import ({names})\b", rf"\1from {PACKAGE} import \2", text)
        text = re.sub(rf"(?m)^(\s*)from ({names})\b", rf"\1from {PACKAGE}.\2", text)
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (folder / "__init__.py").write_text(INIT)


class CustomBuildHook(BuildHookInterface):
    """What hatchling calls before it builds a wheel."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version != "editable":  # there, the checkout itself is on the path
            folder = Path(tempfile.mkdtemp()) / PACKAGE
            write_package(folder)
            build_data["force_include"][str(folder)] = PACKAGE
