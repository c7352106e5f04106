//! What is generated from the types is what is in the repository.

#[path = "../examples/crds/render.rs"]
mod render;

use std::path::Path;

#[test]
fn generated_files_are_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (path, content) in render::files().unwrap() {
        let current = std::fs::read_to_string(root.join(&path)).unwrap_or_default();
        // Not assert_eq!: the difference would be pages long.
        assert!(current == content, "{path} is out of date; run: {}", render::COMMAND);
    }
}

#[test]
fn no_crd_is_left_over() {
    let known: Vec<String> = render::files().unwrap().into_iter().map(|(path, _)| path).collect();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = format!("crds/{}", entry.unwrap().file_name().display());
        assert!(known.contains(&path), "{path} is not generated any more; remove it");
    }
}

#[test]
fn the_yaml_says_what_the_types_say() {
    let files = render::files().unwrap();
    for crd in forebay_api::crds() {
        let name = crd.metadata.name.clone().unwrap();
        let (_, yaml) = files.iter().find(|(path, _)| *path == format!("crds/{name}.yaml")).unwrap();
        let read = serde_saphyr::from_str(yaml).unwrap();
        assert_eq!(crd, read, "{name}");
    }
}

/// What the API server demands of a structural schema, and what we demand of ours.
#[test]
fn every_field_has_a_type_and_a_description() {
    fn walk(path: &str, schema: &serde_json::Value, described: bool) {
        let is_quantity = schema["x-kubernetes-int-or-string"] == true;
        assert!(schema["type"].is_string() != is_quantity, "{path} needs exactly one type");
        assert!(
            !described || schema["description"].as_str().is_some_and(|text| !text.is_empty()),
            "{path}: description"
        );
        assert!(schema["anyOf"].is_null() && schema["oneOf"].is_null() && schema["allOf"].is_null(), "{path}");
        assert!(schema["nullable"].is_null() && schema["title"].is_null(), "{path}");
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let ours = !["apiVersion", "kind", "metadata"].contains(&name.as_str()) || path.contains('.');
            walk(&format!("{path}.{name}"), property, ours);
        }
        if !schema["items"].is_null() {
            assert!(schema["x-kubernetes-list-type"].is_string(), "{path} needs a list type");
            walk(&format!("{path}[]"), &schema["items"], false);
        }
    }
    for crd in forebay_api::crds() {
        let kind = crd.spec.names.kind.clone();
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
        for part in ["spec", "status"] {
            walk(&format!("{kind}.{part}"), &schema["openAPIV3Schema"]["properties"][part], true);
        }
    }
}
