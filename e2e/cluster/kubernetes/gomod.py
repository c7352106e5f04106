#!/usr/bin/env python3
"""Prints a go.mod that builds Kubernetes from its published modules: gomod.py v1.37.2 v3.7.3 > go.mod

k8s.io/kubernetes replaces its staging modules by local folders, which a module consumer does not have; here each is
replaced by its published version instead (v1.37.2 -> v0.37.2). The list is read from the module's own go.mod.
"""
import json, re, subprocess, sys

kubernetes, etcd = sys.argv[1:3]
module = json.loads(subprocess.run(["go", "mod", "download", "-json", f"k8s.io/kubernetes@{kubernetes}"],
                                   check=True, stdout=subprocess.PIPE, text=True, cwd="/").stdout)
staging = sorted(set(re.findall(r"(k8s\.io/[\w\-/]+) => \./staging", open(module["GoMod"]).read())))
library = "v0" + kubernetes[len("v1"):]
print(f"""module forebay.io/e2e/kubernetes

go 1.26

require (
\tgo.etcd.io/etcd/server/v3 {etcd}
\tk8s.io/component-base {library}
\tk8s.io/kubectl {library}
\tk8s.io/kubernetes {kubernetes}
)

replace (""")
for name in staging:
    print(f"\t{name} => {name} {library}")
print(")")
