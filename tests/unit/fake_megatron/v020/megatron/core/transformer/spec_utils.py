class ModuleSpec:
    def __init__(self, module, submodules=None):
        self.module, self.submodules = module, submodules


def build_module(spec, **kwargs):
    if spec.submodules is not None:
        kwargs["submodules"] = spec.submodules
    try:
        return spec.module(**kwargs)
    except Exception as error:
        raise type(error)(f"{error!s} when instantiating {spec.module.__name__}") from error
