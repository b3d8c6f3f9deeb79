//! The CustomResourceDefinition.
