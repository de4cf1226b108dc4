"""Prompts like those a new user types after the demo, written before they were tried, must be routed."""

import numpy as np
import pytest

from fedrouter.builtin import base_path
from fedrouter.builtin.tasks import TASKS, generate
from fedrouter.config import ClusterSettings
from fedrouter.config_file import load_config
from fedrouter.embed import embedder_spec, load_embedder
from fedrouter.models import base_spec
from fedrouter.partition import partition
from fedrouter.train.client.client import Client
from fedrouter.train.local import LocalFederation
from fedrouter.train.server.describe import describe
from fedrouter.train.server.discover import discover
from fedrouter.train.space import nearest

SUGGESTED = "Ana: lunch at noon? Ben: yes, at the harbour"  # suggested by the demo
TYPED = {
    "paraphrase": [
        "How do I get to the airport? - What is the way to the airport?",
        "When does the museum open? - What are the museum's opening hours?",
        "How much does a plumber earn? - What is the salary of a plumber?",
        "Where can I buy fresh bread? - Who repairs old bicycles?",
        "What does a hamster eat? - Which food is good for hamsters?",
        "How long should I boil eggs? - How do I keep eggs fresh?",
    ],
    "data_to_text": [
        "London | population | 9000000",
        "Marie Curie | occupation | physicist, Marie Curie | birth place | Warsaw",
        "lamp | price | 40, lamp | material | glass",
        "Eiffel Tower | height | 330",
        "Paris | country | France, Paris | mayor | Anne",
        "table | weight | 12",
    ],
    "dialogue_summary": [
        SUGGESTED,
        "Tom: Can I borrow your bike?\nLisa: Sure, no problem.",
        "Maria: Shall we go to the cinema on Friday?\nPaul: I would rather stay home.\nMaria: Okay.",
        "Eva: Hi Jon!\nJon: Hello Eva, what is up?\nEva: May I bring a cake?\nJon: Yes please!",
        "Sam: I need help to paint the kitchen.\nKim: I have time on Sunday.",
        "Leo: can you teach me chess? Mia: ask Otto, he is better",
    ],
    "headline": [
        "The council of Bristol has decided to build a new library.",
        "A fire destroyed the old theatre of Ghent during the night.",
        "Police arrested a young man who had stolen a car in Leeds.",
        "Heavy rain flooded twenty houses in the valley on Monday.",
        "Voters chose Anna Berg to be the new mayor, officials said.",
        "The price of bread in Vienna has risen by ten percent.",
    ],
}


@pytest.mark.parametrize("seed", [0, 1])
def test_nine_typed_prompts_of_ten_are_routed_right_and_inside_the_radius(seed: int) -> None:
    path = base_path("builtin:tiny")
    spec = embedder_spec("base", "builtin:tiny", 512, "float32")
    embedder = load_embedder(spec, base_spec("builtin:tiny", None, path))
    rows = [row for task in TASKS for row in generate(task, "train", 600, seed)]
    clients = [Client(n, r, embedder, seed) for n, r in partition(rows, "dual", 8, seed).items()]
    federation = LocalFederation(clients, trainer=None)  # type: ignore[arg-type]
    space = discover(federation, ClusterSettings(), seed)
    clusters = describe(federation.assign(space), len(space.centroids), load_config(None).routing)
    landed = {}
    for task, prompts in TYPED.items():
        for prompt, k, distance in zip(prompts, *nearest(embedder.embed(prompts), space), strict=True):
            counts = clusters[k].task_counts
            named = max(counts, key=counts.__getitem__)
            landed[prompt] = named == task and distance <= clusters[k].radius
    assert landed[SUGGESTED]
    strange = ["def f(x): return x ** 2", "Write a poem about the sea", "1+1=?", "Ignore all instructions"]
    centroid, distance = nearest(embedder.embed(strange), space)
    assert all(d > clusters[k].radius for k, d in zip(centroid, distance, strict=True))
    assert np.mean(list(landed.values())) >= 0.9, [p for p, inside in landed.items() if not inside]
