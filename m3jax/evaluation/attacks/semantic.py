"""PromptBench's semantic attack: prompts of the same meaning, translated into English from six other languages.

The sentences are those of promptbench/prompts/semantic_atk_prompts.py in github.com/microsoft/promptbench at fcda538
(SEMANTIC_ADV_PROMPT_SET: Chinese, French, Arabic, Spanish, Japanese, Korean), each once, without the space at their
end. They are used under their licence:

MIT License. Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from collections.abc import Mapping
from types import MappingProxyType

_SST2 = (
    "Answer whether the statement is 'positive' or 'negative' based on sentiment analysis.",
    "As an emotion analysis tool, determine whether the emotion in the text is 'positive' or 'negative'.",
    "Categorize the statement as 'positive' or 'negative', based on its emotional bent.",
    "Please use sentiment analysis to classify the text as 'positive' or 'negative'.",
    "Please determine whether the emotion of the sentence is 'positive' or 'negative' and categorize it.",
    "Using sentiment analysis, classify the text as 'positive' or 'negative'.",
    "Please answer whether the emotion of the sentence is 'positive' or 'negative' and categorize it.",
    "Categorize the statement as 'positive' or 'negative' based on sentiment analysis.",
    "Please judge this text as 'positive' or 'negative' according to the criteria of sentiment analysis.",
    ("Please classify this sentence as 'positive' or 'negative' according to the principles of emotion analysis."),
    "As a sentiment analysis tool, please answer with 'positive' or 'negative' to classify this statement.",
    "Determine whether this phrase is 'positive' or 'negative' as a sentiment classification tool.",
    ("Identify the tone of this statement by choosing between 'positive' and 'negative' as a sentiment analysis tool."),
    "Use sentiment analysis to classify this statement as 'positive' or 'negative'.",
    "As a sentiment classification tool, please determine whether this statement is 'positive' or 'negative'.",
    "Classify this sentence as 'positive' or 'negative' using sentiment analysis.",
    "Choose between 'positive' or 'negative' to classify this statement as a sentiment analysis tool.",
    (
        "Identify the sentiment expressed in this statement by selecting 'positive' or 'negative' as a sentiment "
        "classification tool."
    ),
    ("Determine whether this phrase is 'positive' or 'negative' using sentiment analysis as a classification tool."),
    "Under emotional analysis, answer 'positive' or 'negative' to classify this statement.",
    "Does this statement express a 'positive' or 'negative' reaction?",
    "Is that a 'positive' or a 'negative' phrase?",
    "What is the classification between 'positive' and 'negative'?",
    "Does this sentence express 'positive' or 'negative' feelings?",
    ("In the context of textual analysis, what classification is this phrase between 'positive' and 'negative'?"),
    "Could this be classified as 'positive' or 'negative'?",
    ("In the context of emotional analysis, what classification is this statement between 'positive' and 'negative'?"),
    "Can this be classified as 'positive' or 'negative'?",
    "Under the classification of emotions, is this sentence 'positive' or 'negative'?",
    "As a feeling analysis tool, classify this statement as 'positive' or 'negative'.",
    "Determine whether this statement has a 'positive' or 'negative' connotation.",
    "Indicate whether the following statement is 'positive' or 'negative'.",
    "Evaluate whether this text has a 'positive' or 'negative' emotional charge.",
    "According to your sentiment analysis, would you say this comment is 'positive' or 'negative'?",
    "In the context of sentiment analysis, label this sentence as 'positive' or 'negative'.",
    "Rate the following statement as 'positive' or 'negative', according to your sentiment analysis.",
    "How would you classify this text in terms of its emotional tone? 'positive' or 'negative'?",
    "As a tool for sentiment analysis, would you say this statement is 'positive' or 'negative'?",
    "Classify this statement as 'positive' or 'negative', please.",
    "Treat this sentence as an emotion analysis tool and categorize it as 'positive' and 'negative'.",
    "Use this article as a sentiment analysis tool to classify 'positive' and 'negative'.",
    "Use this sentence as an emotion analysis tool to determine whether it is 'positive' or 'negative'.",
    "Use this sentence as an emotion analysis tool to classify 'positive' and 'negative'.",
    "Use this sentence as a sentiment analysis tool and classify it as 'positive' or 'negative'.",
    "To classify this sentence as 'positive' or 'negative', evaluate it as a sentiment analysis tool.",
    "Treat this sentence as an emotion analysis tool to determine whether it is 'positive' or 'negative'.",
    "Use this sentence as a sentiment analysis tool to classify 'positive' and 'negative'.",
    "Analyze this sentence as an emotion analysis tool to classify whether it is 'positive' or 'negative'.",
    "Use this sentence as an emotional analysis tool to determine whether it is 'positive' or 'negative'.",
    "As an emotional analysis tool, respond with 'positive' or 'negative' to classify these sentences.",
    ("Classify this sentence as 'positive' if you regard it as positive, 'negative' if you regard it as negative."),
    "Please rate the emotion of this sentence and classify it as 'positive' or 'negative'.",
    (
        "Classify this sentence as 'positive' if you perceive it positively and 'negative' if you perceive it "
        "negatively."
    ),
    (
        "If this is a sentence delivered using a positive expression, classify it as 'positive' and if this is a "
        "sentence delivered using a negative expression, classify it as 'negative'."
    ),
    "Respond with 'positive' or 'negative' by categorizing whether the sentence is positive or negative.",
    "Please analyze the emotion in this sentence and classify it as 'positive' or 'negative'.",
    (
        "Classify this sentence as 'positive' if it contains a positive meaning, 'negative' if it contains a "
        "negative meaning."
    ),
    (
        "Classify this sentence as 'positive' if it contains positive content, 'negative' if it contains negative"
        " content."
    ),
    (
        "Classify what you're trying to convey in this sentence as 'positive' if it's positive, and 'negative' if"
        " it's negative."
    ),
)

_COLA = (
    (
        "As a tool for determining grammatical correctness, please review the following sentences and categorize "
        "them grammatically as 'acceptable' or 'unacceptable'."
    ),
    "Please evaluate the grammar of the following sentences and mark them as 'acceptable' or 'unacceptable'.",
    (
        "Please check that the following sentences are grammatically correct and categorize them as 'acceptable' "
        "or 'unacceptable'."
    ),
    (
        "Please determine whether the following sentences are 'acceptable' or 'unacceptable' based on grammatical"
        " correctness."
    ),
    "Please categorize the grammar of the following sentences as 'acceptable' or 'unacceptable'.",
    "Please check the grammar of the following sentences and classify them as 'acceptable' or 'unacceptable'.",
    ("Please mark the following sentences as 'acceptable' or 'unacceptable' according to the grammatical norms."),
    ("Please assess the grammar of the following sentences and classify them as 'acceptable' or 'unacceptable'."),
    "Please mark the following sentences as 'acceptable' or 'unacceptable' for grammatical accuracy.",
    (
        "As a tool for assessing semantic relevance, categorize the sentence as 'acceptable' or 'unacceptable' "
        "according to its meaning and context."
    ),
    (
        "Determine whether the grammatical structure of the sentence is 'acceptable' or 'unacceptable' by "
        "carefully reviewing it."
    ),
    (
        "Judge whether the sentence follows the syntactic rules of the language and classify it as 'acceptable' "
        "or 'unacceptable'."
    ),
    (
        "Assess the relevance of the sentence by classifying it as 'acceptable' or 'unacceptable' according to "
        "the context in which it is used."
    ),
    (
        "As a semantic classification tool, decide whether the sentence is 'acceptable' or 'unacceptable' "
        "according to its meaning and consistency."
    ),
    "Analyze the sentence carefully and determine whether it is grammatically 'acceptable' or 'unacceptable'.",
    (
        "As a syntactic validation tool, determine whether the sentence is properly structured and categorize it "
        "as 'acceptable' or 'unacceptable'."
    ),
    (
        "When evaluating the grammar of the sentence, classify it as 'acceptable' or 'unacceptable' according to "
        "the rules of the French language."
    ),
    (
        "Determine whether the sentence is 'acceptable' or 'unacceptable' depending on its syntactic construction"
        " and semantic context."
    ),
    (
        "As a tool for linguistic analysis, categorize the sentence as 'acceptable' or 'unacceptable' according "
        "to its relevance and semantic consistency."
    ),
    (
        "As a tool for determining grammatical correctness, review the sentence and classify its rules as "
        "'acceptable' or 'unacceptable'."
    ),
    "Analyze the sentence carefully and classify its grammar between 'acceptable' or 'unacceptable'.",
    (
        "As a tool for determining grammatical correctness, classify the rules of the sentence between "
        "'acceptable' or 'unacceptable'."
    ),
    (
        "Evaluate the correctness of the sentence between 'acceptable' or 'unacceptable', as a tool for "
        "determining grammatical correctness."
    ),
    (
        "As a tool for classifying valid sentences, determine whether  'acceptable' or 'unacceptable' is based on"
        " its grammatical rules."
    ),
    ("Analyze the sentence carefully and classify its grammatical rules between 'acceptable' or 'unacceptable'."),
    "Analyze the sentence and classify it between 'acceptable' or 'unacceptable' as a grammatical check tool.",
    (
        "As a classification tool for grammatical sentences, determine whether the sentence 'acceptable' or "
        "'unacceptable' is based on its rules."
    ),
    ("As a tool for analyzing grammar, classify the rules of the sentence between 'acceptable' or 'unacceptable'."),
    (
        "Determine whether the sentence is 'acceptable' or 'unacceptable' as a tool for determining grammatical "
        "correctness and analyze its grammar."
    ),
    (
        "As a tool to determine grammatical correctness, review the sentence and categorize its grammar as "
        "'acceptable' or 'unacceptable'."
    ),
    "Analyze the sentence carefully and classify its grammar as 'acceptable' or 'unacceptable'.",
    (
        "As a tool for determining grammatical correctness, it categorizes the grammatical rules of the sentence "
        "as 'acceptable' or 'unacceptable'."
    ),
    (
        "Evaluate the grammatical correctness of the sentence and classify it as 'acceptable' or 'unacceptable' "
        "using a grammatical verification tool."
    ),
    (
        "As a tool for classifying grammatically correct sentences, determine whether the sentence is "
        "'acceptable' or 'unacceptable' based on its grammatical rules."
    ),
    (
        "Analyse the sentence carefully and classify its grammar as 'acceptable' or 'unacceptable' using a "
        "grammatical revision tool."
    ),
    (
        "As a tool for classifying grammatical sentences, it determines whether the sentence is 'acceptable' or "
        "'unacceptable' using its grammatical structure."
    ),
    (
        "As a tool for analyzing grammatical correctness, it categorizes the grammatical rules of the sentence as"
        " 'acceptable' or 'unacceptable'."
    ),
    (
        "Determine whether the sentence is 'acceptable' or 'unacceptable' using a grammatical verification tool "
        "and sort it accordingly."
    ),
    (
        "As a tool for determining grammatical correctness, evaluate the sentence and classify it as 'acceptable'"
        " or 'unacceptable' based on its grammatical rules."
    ),
    (
        "As a tool to determine whether grammar is grammatically correct, look at the sentence and categorize "
        "grammar into the 'acceptable' or 'unacceptable' categories."
    ),
    ("Please read the given sentence and categorize the grammar into the 'acceptable' or 'unacceptable' categories."),
    (
        "To determine the correctness of a sentence, categorize grammar into two categories: 'acceptable' or "
        "'unacceptable'."
    ),
    "Classify the grammar of a given sentence into two categories: 'acceptable' and 'unacceptable'.",
    (
        "Classify a given sentence into the categories 'acceptable' or 'unacceptable' to determine whether it is "
        "grammatically correct."
    ),
    (
        "To determine whether it is grammatically correct, categorize a given sentence into two categories: "
        "'acceptable' or 'unacceptable'."
    ),
    (
        "To determine the correctness of grammar, categorize a given sentence into two categories: 'acceptable' "
        "or 'unacceptable'."
    ),
    (
        "Classify the grammar of a given sentence into two categories, 'acceptable' or 'unacceptable', and judge "
        "its accuracy."
    ),
    (
        "To determine whether it is grammatically correct, divide a given sentence into two categories: "
        "'acceptable' or 'unacceptable'."
    ),
    (
        "To evaluate the accuracy of grammar, categorize a given sentence into two categories: 'acceptable' or "
        "'unacceptable'."
    ),
    (
        "As a tool for judging grammatical correctness, please review the sentences and classify the grammar as "
        "'acceptable' or 'unacceptable'."
    ),
    "Please read the given sentences, and classify the grammar as 'acceptable' or 'unacceptable'.",
    ("Please classify the sentences as 'acceptable' or 'unacceptable' to judge the grammatical appropriateness."),
    "Please classify the grammar of the given sentences into 2 categories: 'acceptable' or 'unacceptable'.",
    ("Please classify the given sentences as 'acceptable' or 'unacceptable' to judge the correctness of the grammar."),
    (
        "Please classify the given sentences as 'acceptable' or 'unacceptable' in order to judge their "
        "grammatical appropriateness."
    ),
    ("Please determine the correctness of your grammar by classifying sentences as 'acceptable' or 'unacceptable'."),
    "Classify the grammar of a given sentence as 'acceptable' or 'unacceptable', and judge its accuracy.",
    "Please rate the accuracy of your grammar by categorizing sentences as 'acceptable' or 'unacceptable'.",
)

PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"sst2": _SST2, "cola": _COLA})
"""By task, prompts behind which the example is to stand.

Example:
    >>> {task: len(prompts) for task, prompts in PROMPTS.items()}
    {'sst2': 59, 'cola': 58}
"""
