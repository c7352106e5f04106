//! The CRDs, as `kube` derives them from the types, made to look like those of Kubernetes itself.
//!
//! What changes: optional fields are not nullable (an empty `quota:` is a mistake, not a value), integer formats are
//! those that Kubernetes knows, descriptions are not broken where the lines of our comments are, and lists that say
//! nothing of it are replaced as a whole.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

use crate::{CacheRuntime, Dataset, PreloadPolicy};

/// The CustomResourceDefinitions of the group.
pub fn crds() -> [CustomResourceDefinition; 3] {
    let mut crds = [CacheRuntime::crd(), Dataset::crd(), PreloadPolicy::crd()];
    for version in crds.iter_mut().flat_map(|crd| &mut crd.spec.versions) {
        if let Some(schema) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) {
            conform(schema);
        }
    }
    crds
}

fn conform(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    schema.title = None;
    if let Some(description) = &mut schema.description {
        *description = description.replace('\n', " ");
    }
    if let Some(format) = &schema.format {
        // 32 bits without a sign do not fit into int32.
        schema.format = match format.as_str() {
            "int32" | "uint8" | "uint16" => Some("int32".into()),
            "int64" | "uint32" | "uint64" => Some("int64".into()),
            "date-time" => Some("date-time".into()),
            _ => None,
        };
    }
    for property in schema.properties.iter_mut().flat_map(|properties| properties.values_mut()) {
        conform(property);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        conform(items);
        schema.x_kubernetes_list_type.get_or_insert_with(|| "atomic".into());
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        conform(values);
    }
}
