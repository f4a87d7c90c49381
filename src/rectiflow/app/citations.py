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
    "exact": (
        "the preset `exact`: DirectEdit's inversion, FTEdit's controls, FlowEdit's noising",
        ("xu2025unveil", "kulikov2025flowedit", "yang2026directedit"),
    ),
    "fast": (
        "the preset `fast`: FTEdit's controls and FlowEdit's noising",
        ("xu2025unveil", "kulikov2025flowedit"),
    ),
    "euler": ("the preset `euler`: Euler inversion of a rectified flow", ("liu2023flow",)),
    "directedit": ("the preset `directedit`: query offsets and values", ("yang2026directedit",)),
    "two-step": (
        "the preset `two-step`: the explicit midpoint rule both ways, and FTEdit's controls",
        ("hairer1993solving", "xu2025unveil"),
    ),
    "rf-solver": ("the preset `rf-solver`: midpoint and values", ("wang2025taming",)),
    "fireflow": ("the preset `fireflow`: midpoint with reused velocity", ("deng2024fireflow",)),
    "rf-inversion": ("the preset `rf-inversion`: drawn to the image", ("rout2025semantic",)),
    "uniedit": ("the preset `uniedit`: Uni-Inv and Uni-Edit", ("jiao2025unieditflow",)),
    "flowedit": ("the preset `flowedit`: no inversion, SD3 settings", ("kulikov2025flowedit",)),
    "flowedit-flux": ("the preset `flowedit-flux`: FLUX settings", ("kulikov2025flowedit",)),
    "dnaedit": ("the preset `dnaedit`: direct noise alignment, SD3.5", ("xie2025dnaedit",)),
    "dnaedit-flux": ("the preset `dnaedit-flux`: FLUX settings", ("xie2025dnaedit",)),
    "sdedit": ("the preset `sdedit`: noise, and the target prompt", ("meng2022sdedit",)),
    "subject": ("the preset `subject`: FTEdit's controls on generations", ("xu2025unveil",)),
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
    "yang2026directedit": """@misc{yang2026directedit,
  title         = {{DirectEdit}: Step-Level Accurate Inversion for Flow-Based Image Editing},
  author        = {Yang, Desong and Ye, Mang},
  year          = {2026},
  eprint        = {2605.02417},
  archiveprefix = {arXiv}
}""",
    "wang2025taming": """@inproceedings{wang2025taming,
  title         = {Taming Rectified Flow for Inversion and Editing},
  author        = {Wang, Jiangshan and Pu, Junfu and Qi, Zhongang and Guo, Jiayi and Ma, Yue and
                   Huang, Nisha and Chen, Yuxin and Li, Xiu and Shan, Ying},
  booktitle     = {International Conference on Machine Learning (ICML)},
  year          = {2025},
  eprint        = {2411.04746},
  archiveprefix = {arXiv}
}""",
    "deng2024fireflow": """@misc{deng2024fireflow,
  title         = {{FireFlow}: Fast Inversion of Rectified Flow for Image Semantic Editing},
  author        = {Deng, Yingying and He, Xiangyu and Mei, Changwang and Wang, Peisong and
                   Tang, Fan},
  year          = {2024},
  eprint        = {2412.07517},
  archiveprefix = {arXiv}
}""",
    "rout2025semantic": """@inproceedings{rout2025semantic,
  title         = {Semantic Image Inversion and Editing using Rectified Stochastic Differential
                   Equations},
  author        = {Rout, Litu and Chen, Yujia and Ruiz, Nataniel and Caramanis, Constantine and
                   Shakkottai, Sanjay and Chu, Wen-Sheng},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2025},
  eprint        = {2410.10792},
  archiveprefix = {arXiv}
}""",
    "jiao2025unieditflow": """@misc{jiao2025unieditflow,
  title         = {{UniEdit-Flow}: Unleashing Inversion and Editing in the Era of Flow Models},
  author        = {Jiao, Guanlong and Huang, Biqing and Wang, Kuan-Chieh and Liao, Renjie},
  year          = {2025},
  eprint        = {2504.13109},
  archiveprefix = {arXiv}
}""",
    "kulikov2025flowedit": """@inproceedings{kulikov2025flowedit,
  title         = {{FlowEdit}: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models},
  author        = {Kulikov, Vladimir and Kleiner, Matan and Huberman-Spiegelglas, Inbar and
                   Michaeli, Tomer},
  booktitle     = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year          = {2025},
  eprint        = {2412.08629},
  archiveprefix = {arXiv}
}""",
    "xie2025dnaedit": """@misc{xie2025dnaedit,
  title         = {{DNAEdit}: Direct Noise Alignment for Text-Guided Rectified Flow Editing},
  author        = {Xie, Chenxi and Li, Minghan and Li, Shuai and Wu, Yuhui and Yi, Qiaosi and
                   Zhang, Lei},
  year          = {2025},
  eprint        = {2506.01430},
  archiveprefix = {arXiv}
}""",
    "meng2022sdedit": """@inproceedings{meng2022sdedit,
  title         = {{SDEdit}: Guided Image Synthesis and Editing with Stochastic Differential
                   Equations},
  author        = {Meng, Chenlin and He, Yutong and Song, Yang and Song, Jiaming and Wu, Jiajun and
                   Zhu, Jun-Yan and Ermon, Stefano},
  booktitle     = {International Conference on Learning Representations (ICLR)},
  year          = {2022},
  eprint        = {2108.01073},
  archiveprefix = {arXiv}
}""",
}
