"""Look through volumes slice by slice, in a notebook.

    slices.show({"PET": (pet, dict(cmap="gray_r"), "SUV")}, {"truth": truth}, spacing)

A figure with several slices always appears, also on GitHub, which runs no widgets. Below it comes a
slider, if ipywidgets is installed (`pip install ipywidgets`; nothing else here needs it) and a
kernel is running.
"""

import importlib
import os
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython

# The axis that a slice is taken along; volumes are (D, H, W), axes left, anterior, superior.
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
# Colour and line style of outlines, in the order of their names: sky blue and vermillion of the
# Okabe-Ito palette, yellow for a third one.
LINES = (("#56B4E9", "-"), ("#D55E00", "--"), ("#F0E442", ":"))


def widgets():
    """The module ipywidgets if a slider can be shown, else None.

    There is none if ipywidgets is missing, if no kernel of a notebook runs this, or if the
    environment variable TUTORIALS_STATIC is set, as tutorials/run.py does.
    """
    has_kernel = getattr(get_ipython(), "kernel", None) is not None
    if os.environ.get("TUTORIALS_STATIC") or not has_kernel:
        return None
    try:
        return importlib.import_module("ipywidgets")
    except ImportError:
        return None


@dataclass
class Stack:
    """Volumes (D, H, W) on one grid, and what to draw of a slice.

    images: {name: (volume, options of imshow, label of the color bar)}
    outlines: {name: mask}; at most three
    """

    images: dict
    outlines: dict
    spacing: tuple
    plane: str

    @property
    def count(self) -> int:
        """The number of slices."""
        return next(iter(self.images.values()))[0].shape[AXES[self.plane]]

    def slice(self, volume, index):
        """One slice, with its first axis to the right and its second axis up."""
        return np.take(np.asarray(volume), index, AXES[self.plane]).T

    def spread(self, number: int) -> list[int]:
        """Indices of `number` slices, evenly spaced over the masks, else over the whole volume."""
        others = tuple(axis for axis in range(3) if axis != AXES[self.plane])
        marked = np.zeros(self.count, bool)
        for mask in self.outlines.values():
            marked |= np.asarray(mask).any(others)
        found = np.flatnonzero(marked)
        first, last = (found[0], found[-1]) if len(found) else (0, self.count - 1)
        return sorted({round(float(at)) for at in np.linspace(first, last, number)})

    def draw(self, indices):
        """A row per image and a column per index; with one index, the images are side by side."""
        wide = len(indices) == 1
        name, (volume, _, _) = next(iter(self.images.items()))
        across, up = (mm for axis, mm in enumerate(self.spacing) if axis != AXES[self.plane])
        tall, broad = self.slice(volume, 0).shape
        ratio = np.clip(tall * up / (broad * across), 0.5, 2.4)
        shape = (1, len(self.images)) if wide else (len(self.images), len(indices))
        width = 8.6 / max(shape[1], 3)
        size = (width * shape[1] + 0.8, width * ratio * shape[0] + 0.7)
        fig, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
        for row, (name, (volume, style, label)) in enumerate(self.images.items()):
            line = [axes[0, row]] if wide else axes[row]
            limits = dict(vmin=float(np.min(volume)), vmax=float(np.max(volume))) | style
            for axis, index in zip(line, indices):
                picture = self.slice(volume, index)
                shown = axis.imshow(picture, origin="lower", aspect=up / across, **limits)
                axis.set(xticks=[], yticks=[])
                if wide or row == 0:
                    axis.set_title(f"slice {index + 1} of {self.count}", fontsize=9)
                for mask, (color, dashes) in zip(self.outlines.values(), LINES):
                    if self.slice(mask, index).any():
                        outline = dict(colors=color, linestyles=dashes, linewidths=1.4)
                        axis.contour(self.slice(mask, index), [0.5], **outline)
            line[0].set_ylabel(name)
            fig.colorbar(shown, ax=list(line), label=label, shrink=0.85)
        named = zip(self.outlines, LINES)
        marks = [plt.Line2D([], [], color=c, ls=ls, label=name) for name, (c, ls) in named]
        if marks:
            fig.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8)
        return fig


def show(images, outlines, spacing, plane="axial", number=5) -> Stack:
    """Draw `number` slices, and a slider through all of them if there can be one."""
    stack = Stack(images, outlines, tuple(spacing), plane)
    indices = stack.spread(number)
    stack.draw(indices)
    plt.show()
    module = widgets()
    if module:

        def scroll(index):
            stack.draw([index])
            plt.show()

        last, middle = stack.count - 1, indices[len(indices) // 2]
        options = dict(description=plane, continuous_update=False)
        slider = module.IntSlider(value=middle, min=0, max=last, **options)
        module.interact(scroll, index=slider)
    return stack
