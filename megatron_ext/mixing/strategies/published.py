"""Mixtures and reference losses printed in papers or shipped in their repositories, by name.

LLaMA-MoE: arXiv 2406.16554. MoE-SFT: "Dynamic Data Mixing Maximizes Instruction Tuning for
Mixture-of-Experts", arXiv 2406.11256. LLM-Shearing: "Sheared LLaMA", arXiv 2310.06694.
"""

from collections.abc import Sequence

from megatron_ext.errors import UserError

Table = dict[str, dict[str, float]]


def _rows(domains: str, **rows: str) -> Table:
    """Tables from text: one row of numbers under the domains' names."""
    names = domains.split()
    return {
        row: dict(zip(names, map(float, numbers.split()), strict=True))
        for row, numbers in rows.items()
    }


_DOMAINS = "cc c4 github wiki book arxiv stack"
_SHEARED = "cc github book stack wiki arxiv c4"
_SFT = "code math orca sharegpt"

MIXTURES: Table = {
    # LLaMA-MoE's static mixtures of SlimPajama.
    **_rows(
        _DOMAINS,
        llama=".67 .15 .045 .045 .045 .025 .02",
        sheared_llama=".361 .492 .008 .031 .091 .007 .01",
    ),
    # What LLM-Shearing's continued pre-training starts from: the end of its pruning.
    **_rows(_SHEARED, llm_shearing_continue=".2192 .0002 .0791 .0064 .0096 .001 .6845"),
    # MoE-SFT's static baselines: sizes of the sources, distances of sentence embeddings, of gate
    # loads, and the last weights of its dynamic run.
    **_rows(
        _SFT,
        moe_sft_data_size=".03658232 .07860043 .86719935 .01761791",
        moe_sft_sentence=".24472785 .2532278 .2500919 .25195244",
        moe_sft_gate_load=".24664808 .31725317 .22705122 .20904752",
        moe_sft_final=".28506630 .32022977 .21494599 .17975794",
    ),
}

REFERENCE_LOSSES: Table = {
    # LLaMA-2-7B on SlimPajama's validation sets (LLaMA-MoE), pure cross entropy.
    **_rows(
        _DOMAINS,
        llama2_7b_slimpajama="1.6916865110397339 2.074881076812744 0.6984495520591736 "
        "1.5899001359939575 1.925248146057129 1.2408167123794556 1.4974864721298218",
    ),
    # LLM-Shearing's targets for models of three sizes, from a fit to LLaMA-2's losses.
    **_rows(
        _SHEARED,
        llm_shearing_370m="2.1401 .8694 2.3625 1.7791 2.047 1.6637 2.3139",
        llm_shearing_1_3b="1.9643 .7459 2.1393 1.6117 1.7590 1.4449 2.1251",
        llm_shearing_2_7b="1.8712 .6883 2.0325 1.5353 1.6297 1.3560 2.0328",
    ),
    # MoE-SFT: held-out losses at the end of its Uniform run of LLaMA-MoE 2/8.
    **_rows(_SFT, moe_sft_uniform=".26271003 .33384189 .35919693 .44003916"),
}

_SPELLINGS = {
    "cc": "en_cc commoncrawl common_crawl redpajamacommoncrawl",
    "c4": "en_c4 c4_rp redpajamac4",
    "github": "redpajamagithub",
    "wiki": "en_wikipedia wikipedia redpajamawikipedia",
    "book": "en_book books redpajamabook",
    "arxiv": "en_arxiv redpajamaarxiv",
    "stack": "en_stack stackexchange redpajamastackexchange",
    "orca": "openorca",
}
_DOMAIN_OF = {
    other: domain for domain, names in _SPELLINGS.items() for other in (domain, *names.split())
}


def domain_of(name: str) -> str:
    """The papers' short name of a domain (`en_wikipedia`, `RedPajamaWikipedia`: wiki)."""
    plain = name.lower().replace("-", "_")
    return _DOMAIN_OF.get(plain, plain)


def lookup(row: str, table: Table, names: Sequence[str]) -> list[float]:
    """A row of a table in the order of the run's data sets.

    Raises:
        UserError: the run's data sets are not the row's domains.
    """
    values = table[row]
    domains = [domain_of(name) for name in names]
    if sorted(domains) != sorted(values):
        raise UserError(
            f"the published '{row}' is for the domains {', '.join(values)}; "
            f"this run has {', '.join(names)}",
            "name the run's domains like these, or give numbers of your own",
        )
    return [values[domain] for domain in domains]
