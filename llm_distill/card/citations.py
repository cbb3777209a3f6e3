"""The papers of the losses, for the cards of those who used them."""

from collections.abc import Mapping

_SKEWS = (
    "Ko et al. (2024). *DistiLLM: Towards Streamlined Distillation for Large Language Models*. "
    "[arXiv:2402.03898](https://arxiv.org/abs/2402.03898)"
)

_RKD = (
    "Park et al. (2019). *Relational Knowledge Distillation*. "
    "[arXiv:1904.05068](https://arxiv.org/abs/1904.05068)"
)

CITATIONS: Mapping[str, str] = {
    "forward_kl": "Hinton, Vinyals, Dean (2015). *Distilling the Knowledge in a Neural Network*. "
    "[arXiv:1503.02531](https://arxiv.org/abs/1503.02531)",
    "reverse_kl": "Gu et al. (2023). *MiniLLM: Knowledge Distillation of Large Language Models*. "
    "[arXiv:2306.08543](https://arxiv.org/abs/2306.08543)",
    "jsd": "Agarwal et al. (2023). *On-Policy Distillation of Language Models: Learning from "
    "Self-Generated Mistakes*. [arXiv:2306.13649](https://arxiv.org/abs/2306.13649)",
    "skew_forward_kl": _SKEWS,
    "skew_reverse_kl": _SKEWS,
    "tvd": "Wen et al. (2023). *f-Divergence Minimization for Sequence-Level Knowledge "
    "Distillation*. [arXiv:2307.15190](https://arxiv.org/abs/2307.15190)",
    "adaptive_kl": "Wu et al. (2024). *Rethinking Kullback-Leibler Divergence in Knowledge "
    "Distillation for Large Language Models*. "
    "[arXiv:2404.02657](https://arxiv.org/abs/2404.02657)",
    "alpha_beta": "Wang et al. (2025). *ABKD: Pursuing a Proper Allocation of the Probability Mass "
    "in Knowledge Distillation via α-β-Divergence*. "  # noqa: RUF001 (its title)
    "[arXiv:2505.04560](https://arxiv.org/abs/2505.04560)",
    "decoupled": "Zhao et al. (2022). *Decoupled Knowledge Distillation*. "
    "[arXiv:2203.08679](https://arxiv.org/abs/2203.08679)",
    "todi": "Jung et al. (2025). *ToDi: Token-wise Distillation via Fine-Grained Divergence "
    "Control*. [arXiv:2505.16297](https://arxiv.org/abs/2505.16297)",
    "Taid": "Shing et al. (2025). *TAID: Temporally Adaptive Interpolated Distillation for "
    "Efficient Knowledge Transfer in Language Models*. "
    "[arXiv:2501.16937](https://arxiv.org/abs/2501.16937)",
    "mse": "Romero et al. (2014). *FitNets: Hints for Thin Deep Nets*. "
    "[arXiv:1412.6550](https://arxiv.org/abs/1412.6550)",
    "cosine": "Sanh et al. (2019). *DistilBERT, a distilled version of BERT: smaller, faster, "
    "cheaper and lighter*. [arXiv:1910.01108](https://arxiv.org/abs/1910.01108)",
    "map_kl": "Wang et al. (2020). *MiniLM: Deep Self-Attention Distillation for Task-Agnostic "
    "Compression of Pre-Trained Transformers*. [arXiv:2002.10957](https://arxiv.org/abs/2002.10957)",
    "map_mse": "Jiao et al. (2019). *TinyBERT: Distilling BERT for Natural Language "
    "Understanding*. [arXiv:1909.10351](https://arxiv.org/abs/1909.10351)",
    "huber": "Huber (1964). *Robust Estimation of a Location Parameter*. "
    "[doi:10.1214/aoms/1177703732](https://doi.org/10.1214/aoms/1177703732)",
    "attention_transfer": "Zagoruyko, Komodakis (2016). *Paying More Attention to Attention: "
    "Improving the Performance of Convolutional Neural Networks via Attention Transfer*. "
    "[arXiv:1612.03928](https://arxiv.org/abs/1612.03928)",
    "nst": "Huang, Wang (2017). *Like What You Like: Knowledge Distill via Neuron Selectivity "
    "Transfer*. [arXiv:1707.01219](https://arxiv.org/abs/1707.01219)",
    "pkt": "Passalis, Tefas (2018). *Learning Deep Representations with Probabilistic Knowledge "
    "Transfer*. [arXiv:1803.10837](https://arxiv.org/abs/1803.10837)",
    "rkd_distance": _RKD,
    "rkd_angle": _RKD,
    "cka": "Kornblith et al. (2019). *Similarity of Neural Network Representations Revisited*. "
    "[arXiv:1905.00414](https://arxiv.org/abs/1905.00414)",
    "info_nce": "Tian, Krishnan, Isola (2019). *Contrastive Representation Distillation*. "
    "[arXiv:1910.10699](https://arxiv.org/abs/1910.10699)",
    "relations": "Wang et al. (2020). *MiniLMv2: Multi-Head Self-Attention Relation Distillation "
    "for Compressing Pretrained Transformers*. "
    "[arXiv:2012.15828](https://arxiv.org/abs/2012.15828)",
}
"""Papers by the names that objectives are described with."""
