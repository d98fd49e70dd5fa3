"Code for a process in which some modules cannot be imported, though they are installed."


def refusing(names):
    "What refuses the top-level modules `names` from here on."
    return f"""
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(names)!r}:
            raise ModuleNotFoundError(f"{{name}} is refused here", name=name)
sys.meta_path.insert(0, Refused())
"""
