//! Plain requests to the API server: quicker than a `kubectl` for each look, and the answer's code
//! is seen.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use ureq::Agent;
use ureq::http::Request;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// As one user.
#[derive(Clone)]
pub struct Api {
    agent: Agent,
    url: String,
    token: String,
}

/// What came back, whatever its code.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub text: String,
}

impl Answer {
    /// The object, if the request found one.
    pub fn found(&self) -> Option<Value> {
        (self.status == 200).then(|| serde_json::from_str(&self.text).ok()).flatten()
    }

    /// The object, if the code is one of these.
    pub fn expect(self, codes: &[u16]) -> Result<Value> {
        ensure!(codes.contains(&self.status), "{} instead of {codes:?}: {}", self.status, self.text);
        Ok(serde_json::from_str(&self.text)?)
    }

    /// `message` of a refusal.
    pub fn message(&self) -> String {
        let status: Value = serde_json::from_str(&self.text).unwrap_or_default();
        status["message"].as_str().unwrap_or(&self.text).to_owned()
    }
}

impl Api {
    pub fn new(url: &str, authority: &str, token: &str) -> Result<Self> {
        let authority = Certificate::from_pem(authority.as_bytes())?;
        let tls = TlsConfig::builder().root_certs(RootCerts::Specific(Arc::new(vec![authority]))).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .build();
        Ok(Self { agent: config.into(), url: url.to_owned(), token: token.to_owned() })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, "", None)
    }

    pub fn delete(&self, path: &str) -> Result<Answer> {
        self.send("DELETE", path, "", None)
    }

    pub fn post(&self, path: &str, object: &Value) -> Result<Answer> {
        self.send("POST", path, "application/json", Some(object))
    }

    pub fn put(&self, path: &str, object: &Value) -> Result<Answer> {
        self.send("PUT", path, "application/json", Some(object))
    }

    /// A JSON merge patch.
    pub fn merge(&self, path: &str, patch: &Value) -> Result<Answer> {
        self.send("PATCH", path, "application/merge-patch+json", Some(patch))
    }

    /// A strategic merge patch, which knows the lists of built-in types.
    pub fn strategic(&self, path: &str, patch: &Value) -> Result<Answer> {
        self.send("PATCH", path, "application/strategic-merge-patch+json", Some(patch))
    }

    fn send(&self, method: &str, path: &str, kind: &str, body: Option<&Value>) -> Result<Answer> {
        let text = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("Authorization", format!("Bearer {}", self.token))
            .header("Accept", "application/json")
            .header("Content-Type", kind);
        let asked = || format!("{method} {path}");
        let mut answer = if body.is_some() {
            self.agent.run(request.body(text)?).with_context(asked)?
        } else {
            let request = request.body(())?;
            self.agent.run(request).with_context(asked)?
        };
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string().with_context(asked)?;
        Ok(Answer { status: answer.status().as_u16(), text })
    }
}
