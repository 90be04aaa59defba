"""`check_modality`: the one line of a plugin's test. It holds a modality against the contract, and trains with it.

In: a `Modality`, and a backbone for it. Out: nothing, or a `ContractError` that names the field, what was found and the
mend. Works in a temporary directory, on the plugin's own toy samples, and downloads nothing.

    check        check_modality, top to bottom
    declaration  what is declared: name, rules, and whether it can travel to another process
    samples      the toy samples through `decode`, `measure` and `fit`, without torch
    network      the network: steps, an export, and jobs from end to end
    batch        what the collate function gives, held against the declaration and the network
"""

from orchestrator.testing.check import check_modality as check_modality
