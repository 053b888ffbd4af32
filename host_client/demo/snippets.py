"""The Python that the scripted model writes: one template per move, filled in from what it has read.

Each is what a good model writes at that point, its one mistake included: a class without a docstring is
only noticed when the code meets one. Lines are short enough to be shown whole on 80 columns, and none holds
three backticks: DSPy takes those for the end of the code.
"""

from __future__ import annotations

import string

EXPLORE = """
from collections import Counter

print("files:", len(source))
print("characters:", sum(map(len, source.values())))
folders = Counter(path.split("/")[1] for path in source)
print("largest folders:", dict(folders.most_common(4)))
print(source["dspy/__init__.py"][:160])
"""

# The mistake: get_docstring() gives None for a class that has no docstring.
COLLECT = """
import ast

classes = {}
for path, text in source.items():
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(b).split(".")[-1] for b in node.bases]
            doc = ast.get_docstring(node).splitlines()[0]
            span = slice(node.lineno - 1, node.end_lineno)
            classes[node.name] = path, span, bases, doc
used = Counter(b for _, _, bases, _ in classes.values() for b in bases)
print("classes:", len(classes))
print("bases:", dict(used.most_common(20)))
"""

FRAGILE, SOUND = "ast.get_docstring(node).splitlines()[0]", '(ast.get_docstring(node) or "").partition("\\n")[0]'
KEPT = 'print("kept from before the error:", len(classes))'

FIND = string.Template("""
public = set(public_names())  # a tool: it runs on the host

def below(root):
    found, size = {root}, 0
    while size < len(found):  # subclasses of subclasses, too
        size = len(found)
        found |= {n for n, c in classes.items() if found & set(c[2])}
    return sorted((found - {root}) & public)

modules, optimizers = below("$module_root"), below("$optimizer_root")
print("public names:", len(public))
print("modules:", modules)
print("optimizers:", optimizers)
""")

DESCRIBE = string.Template("""
def question(name):
    path, span, _, _ = classes[name]
    excerpt = "\\n".join(source[path].splitlines()[span])[:6000]
    return (f"In one sentence, what does the class {name} do?\\n"
            f"<source>\\n{excerpt}\\n</source>")

def ask(names):
    lines.update(zip(names, llm_query_batched([*map(question, names)])))
    vague = [n for n, text in lines.items() if text.startswith("UNCLEAR")]
    print("described:", len(lines), "of", len(modules + optimizers))
    print("unclear:", vague)
    print("sample:", lines[names[0]])

lines = {}
ask($group)
""")

DESCRIBE_MORE = string.Template("""
ask($group)
""")

# A class that does not say what it is for: its use elsewhere may, and its methods always say something.
LOOK_CLOSER = string.Template("""
vague = [n for n, text in lines.items() if text.startswith("UNCLEAR")]
prompts = []
for name in vague:
    uses = [text[max(0, at - 300) : at + 300] for text in source.values()
            if (at := text.find(name + "(")) >= 0][:5]
    prompts.append(question(name) + "\\nPlaces that use it:\\n"
                   + "\\n".join(uses) + "\\n$insist")
lines.update(zip(vague, llm_query_batched(prompts)))
print("asked again:", len(vague))
print("unclear:", [n for n in vague if lines[n].startswith("UNCLEAR")])
print("closer:", vague[0], "-", lines[vague[0]])
""")

VERIFY = """
wanted = set(modules) | set(optimizers)
longest = max(lines, key=lambda name: len(lines[name]))
print("missing:", sorted(wanted - set(lines)))
failed = [n for n, text in lines.items() if text.startswith("[ERROR]")]
print("failed sub-queries:", failed)
print("in both lists:", sorted(set(modules) & set(optimizers)))
print("longest line:", len(lines[longest]), "characters,", longest)
print("verified:", wanted == set(lines) and not failed)
"""

SUBMIT = """
SUBMIT(
    modules={name: lines[name] for name in modules},
    optimizers={name: lines[name] for name in optimizers},
)
"""
