"""The literature, as BibTeX, and which of it stands behind which method."""

from __future__ import annotations

from rectiflow._version import __version__

METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rectiflow": ("this software", ("rectiflow",)),
    "instaflow": ("reflow and distillation to one step", ("liu2024instaflow",)),
    "ftedit": (
        "two-stage inversion, AdaLN and value controls; the preset `ftedit`",
        ("xu2025unveil",),
    ),
    "exact": ("the preset `exact`: FTEdit's inversion to a tolerance", ("xu2025unveil",)),
    "euler": ("the preset `euler`: Euler inversion of a rectified flow", ("liu2023flow",)),
    "rectified-flow": ("straight paths, reflow, straightness", ("liu2023flow",)),
    "sd3": ("Stable Diffusion 3: shifted grid, joint transformer", ("esser2024scaling",)),
    "derived-mask": (
        "mask_threshold: where prompts disagree",
        ("couairon2023diffedit",),
    ),
    "ddim": ("Euler on a diffusion model's straightened flow", ("song2021denoising",)),
    "dopri5": ("the adaptive solver, by torchdiffeq", ("dormand1980family", "torchdiffeq")),
    "ab2": ("Adams-Bashforth of order 2 on any grid", ("hairer1993solving",)),
    "pie-bench": ("the kinds of edits", ("ju2024pnp",)),
}
"""Name -> (what it is, keys of `BIBTEX`)."""

BIBTEX = {
    "rectiflow": f"""@software{{rectiflow,
  title   = {{rectiflow}},
  author  = {{{{The rectiflow authors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}""",
    "liu2024instaflow": """@inproceedings{liu2024instaflow,
  title         = {{InstaFlow}: One Step is Enough for High-Quality Diffusion-Based
                   Text-to-Image Generation},
  author        = {Liu, Xingchao and Zhang, Xiwen and Ma, Jianzhu and Peng, Jian and Liu, Qiang},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2024},
  eprint        = {2309.06380},
  archiveprefix = {arXiv}
}""",
    "xu2025unveil": """@inproceedings{xu2025unveil,
  title         = {Unveil Inversion and Invariance in Flow Transformer for Versatile Image
                   Editing},
  author        = {Xu, Pengcheng and Jiang, Boyuan and Hu, Xiaobin and Luo, Donghao and
                   He, Qingdong and Zhang, Jiangning and Wang, Chengjie and Wu, Yunsheng and
                   Ling, Charles and Wang, Boyu},
  booktitle     = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages         = {28479--28489},
  year          = {2025},
  eprint        = {2411.15843},
  archiveprefix = {arXiv}
}""",
    "liu2023flow": """@inproceedings{liu2023flow,
  title         = {Flow Straight and Fast: Learning to Generate and Transfer Data with
                   Rectified Flow},
  author        = {Liu, Xingchao and Gong, Chengyue and Liu, Qiang},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2023},
  eprint        = {2209.03003},
  archiveprefix = {arXiv}
}""",
    "esser2024scaling": r"""@inproceedings{esser2024scaling,
  title         = {Scaling Rectified Flow Transformers for High-Resolution Image Synthesis},
  author        = {Esser, Patrick and Kulal, Sumith and Blattmann, Andreas and Entezari, Rahim and
                   M{\"u}ller, Jonas and Saini, Harry and Levi, Yam and Lorenz, Dominik and
                   Sauer, Axel and Boesel, Frederic and Podell, Dustin and Dockhorn, Tim and
                   English, Zion and Rombach, Robin},
  booktitle     = {International Conference on Machine Learning (ICML)},
  year          = {2024},
  eprint        = {2403.03206},
  archiveprefix = {arXiv}
}""",
    "couairon2023diffedit": """@inproceedings{couairon2023diffedit,
  title         = {{DiffEdit}: Diffusion-based Semantic Image Editing with Mask Guidance},
  author        = {Couairon, Guillaume and Verbeek, Jakob and Schwenk, Holger and Cord, Matthieu},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2023},
  eprint        = {2210.11427},
  archiveprefix = {arXiv}
}""",
    "song2021denoising": """@inproceedings{song2021denoising,
  title         = {Denoising Diffusion Implicit Models},
  author        = {Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2021},
  eprint        = {2010.02502},
  archiveprefix = {arXiv}
}""",
    "dormand1980family": """@article{dormand1980family,
  title   = {A family of embedded {Runge-Kutta} formulae},
  author  = {Dormand, J. R. and Prince, P. J.},
  journal = {Journal of Computational and Applied Mathematics},
  volume  = {6},
  number  = {1},
  pages   = {19--26},
  year    = {1980}
}""",
    "torchdiffeq": """@misc{torchdiffeq,
  title  = {torchdiffeq},
  author = {Chen, Ricky T. Q.},
  year   = {2018},
  url    = {https://github.com/rtqichen/torchdiffeq}
}""",
    "hairer1993solving": r"""@book{hairer1993solving,
  title     = {Solving Ordinary Differential Equations {I}: Nonstiff Problems},
  author    = {Hairer, Ernst and N{\o}rsett, Syvert P. and Wanner, Gerhard},
  edition   = {2},
  publisher = {Springer},
  year      = {1993}
}""",
    "ju2024pnp": """@inproceedings{ju2024pnp,
  title         = {{PnP} Inversion: Boosting Diffusion-based Editing with 3 Lines of Code},
  author        = {Ju, Xuan and Zeng, Ailing and Bian, Yuxuan and Liu, Shaoteng and Xu, Qiang},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2024},
  eprint        = {2310.01506},
  archiveprefix = {arXiv}
}""",
}
