"""Published work that more than one method follows. A method names its own place in it: `PAPER.at("section")`."""

from __future__ import annotations

from .reference import Reference

ACTIVE_DORMANT = Reference(
    key="guo2024active",
    title="Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs",
    authors="Tianyu Guo and Druv Pai and Yu Bai and Jiantao Jiao and Michael I. Jordan and Song Mei",
    year=2024,
    arxiv="2410.13835",
    code="https://github.com/GuoTianYu2000/Active-Dormant-Attention",
)
WHEN_SINKS_EMERGE = Reference(
    key="gu2024when",
    title="When Attention Sink Emerges in Language Models: An Empirical View",
    authors="Xiangming Gu and Tianyu Pang and Chao Du and Qian Liu and Fengzhuo Zhang and Cunxiao Du "
    "and Ye Wang and Min Lin",
    year=2025,
    arxiv="2410.10781",
    code="https://github.com/sail-sg/Attention-Sink",
    venue="International Conference on Learning Representations",
)
MASSIVE_ACTIVATIONS = Reference(
    key="sun2024massive",
    title="Massive Activations in Large Language Models",
    authors="Mingjie Sun and Xinlei Chen and J. Zico Kolter and Zhuang Liu",
    year=2024,
    arxiv="2402.17762",
    code="https://github.com/locuslab/massive-activations",
    venue="Conference on Language Modeling",
)
SUPER_EXPERTS = Reference(
    key="su2025unveiling",
    title="Unveiling Super Experts in Mixture-of-Experts Large Language Models",
    authors="Zunhai Su and others",
    year=2025,
    arxiv="2507.23279",
    code="https://github.com/ZunhaiSu/Super-Experts-Profilling",
)
PREPLAN_AND_ANCHOR = Reference(
    key="li2025attention",
    title="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy "
    "Optimization",
    authors="Yang Li and Zhichen Dong and Yuhan Sun and Weixun Wang and Shaopan Xiong and Yijia Luo and Jiashun Liu "
    "and Han Lu and Jiamang Wang and Wenbo Su and Bo Zheng and Junchi Yan",
    year=2025,
    arxiv="2510.13554",
    section="windowed average attention distance and future attention influence",
)
SINK_PROFILER = Reference(
    key="scheuer2026profiler",
    title="attention-sink-profiler",
    authors="JohnScheuer",
    year=2026,
    arxiv="",
    section="profile_attention_sink.py and experiment 3 of advanced_experiments.py",
    code="https://github.com/JohnScheuer/attention-sink-profiler",
)
VISUAL_SINKS = Reference(
    key="kang2025see",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    authors="Seil Kang and Jinyeong Kim and Junhyeok Kim and Seong Jae Hwang",
    year=2025,
    arxiv="2503.03321",
    code="https://github.com/seilk/VisAttnSink",
    venue="International Conference on Learning Representations",
)
EMBED_LENS = Reference(
    key="fan2026what",
    title="What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large Language "
    "Models",
    authors="Yingqi Fan and Junlong Tong and Anhao Zhao and Xiaoyu Shen",
    year=2026,
    arxiv="2603.00510",
    code="https://github.com/EIT-NLP/EmbedLens",
)
VISION_SINKS = Reference(
    key="luo2025sink",
    title="To Sink or Not to Sink: Visual Information Pathways in Large Vision-Language Models",
    authors="Jiayun Luo and Wan-Cyuan Fan and Lyuyang Wang and Xiangteng He and Tanzila Rahman and "
    "Purang Abolmaesumi and Leonid Sigal",
    year=2025,
    arxiv="2510.08510",
    venue="International Conference on Learning Representations",
)
RANDOM_VISUAL_TOKENS = Reference(
    key="wang2025all",
    title="All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs",
    authors="Yahong Wang and Juncheng Wu and Zhangkai Ni and Longzhen Yang and Yihang Liu and Chengmei Yang "
    "and Ying Wen and Xianfeng Tang and Hui Liu and Yuyin Zhou and Lianghua He",
    year=2025,
    arxiv="2512.07580",
    code="https://github.com/YahongWang1/Information-Horizon",
)
VISUAL_SINK_GATING = Reference(
    key="choi2026when",
    title="When Sinks Help or Hurt: Unified Framework for Attention Sink in Large Vision-Language Models",
    authors="Jiho Choi and Jaemin Kim and Sanghwan Kim and Seunghoon Hong and Jin-Hwi Park",
    year=2026,
    arxiv="2604.03316",
)
PAYING_ATTENTION_TO_IMAGE = Reference(
    key="liu2024paying",
    title="Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
    authors="Shi Liu and Kecheng Zheng and Wei Chen",
    year=2024,
    arxiv="2407.21771",
    code="https://github.com/LALBJ/PAI",
    venue="European Conference on Computer Vision",
)
ATTENTION_DEBIASING = Reference(
    key="zhao2025attention",
    title="Attention Debiasing for Token Pruning in Vision Language Models",
    authors="Kai Zhao and others",
    year=2025,
    arxiv="2508.17807",
    code="https://github.com/intcomp/attention-bias",
)
FASTV = Reference(
    key="chen2024image",
    title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
    "Models",
    authors="Liang Chen and Haozhe Zhao and Tianyu Liu and Shuai Bai and Junyang Lin and Chang Zhou and Baobao Chang",
    year=2024,
    arxiv="2403.06764",
    code="https://github.com/pkunlp-icler/FastV",
)
DIVPRUNE = Reference(
    key="alvar2025divprune",
    title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    authors="Saeed Ranjbar Alvar and Gursimran Singh and Mohammad Akbari and Yong Zhang",
    year=2025,
    arxiv="2503.02175",
    code="https://github.com/vbdi/divprune",
)
GAZE_SHIFTS = Reference(
    key="gift2025",
    title="Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
    authors="Zheng Qi and Chao Shang and Evangelia Spiliopoulou and Nikolaos Pappas",
    year=2025,
    arxiv="2510.22067",
    code="https://github.com/amazon-science/GIFT",
)
INFORMED_TOKENS = Reference(
    key="arif2025paint",
    title="PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large Vision-Language Model",
    authors="Kazi Hasan Ibn Arif and Sajib Acharjee Dip and Khizar Hussain and Lang Zhang and Chris Thomas",
    year=2025,
    arxiv="2501.12206",
    code="https://github.com/hasanar1f/PAINT",
)
