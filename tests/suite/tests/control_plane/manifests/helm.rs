//! Renders the chart: with `helm` if it is installed, else with an engine of the same template
//! language and the few functions that the chart uses.

use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use gtmpl::{Context, FuncError, Template, Value as Term};
use serde_json::{Value, json};

use super::{directory, objects, schema};

/// The namespace for which the chart is rendered.
pub(crate) const NAMESPACE: &str = "dataplane-system";

/// The program or library that rendered the chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Helm,
    /// The crate gtmpl.
    Gtmpl,
}

/// Renders the chart with these values over its defaults; returns the objects and the engine.
pub(crate) fn render(values: &Value) -> Result<(Vec<Value>, Engine)> {
    let chart = directory().join("helm/dataplane");
    let overrides = tempfile::NamedTempFile::new()?;
    fs::write(overrides.path(), values.to_string())?;
    let mut helm = Command::new("helm");
    helm.args(["template", "dataplane"]).arg(&chart).args(["--namespace", NAMESPACE, "--values"]);
    match helm.arg(overrides.path()).stdin(Stdio::null()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((expand(&chart, values)?, Engine::Gtmpl)),
        Err(error) => Err(error).context("run helm"),
        Ok(output) if output.status.success() => {
            Ok((objects::parse(&String::from_utf8(output.stdout)?)?, Engine::Helm))
        }
        Ok(output) => bail!("helm template: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// A values file in the chart's directory.
pub(crate) fn values(file: &str) -> Result<Value> {
    yaml(&directory().join("helm/dataplane").join(file))
}

fn expand(chart: &Path, overrides: &Value) -> Result<Vec<Value>> {
    let mut values = yaml(&chart.join("values.yaml"))?;
    merge(&mut values, overrides);
    let schema = fs::read_to_string(chart.join("values.schema.json"))?;
    let violations = schema::violations(&serde_json::from_str(&schema)?, &values)?;
    ensure!(violations.is_empty(), "values: {}", violations.join("; "));

    let chart_yaml = yaml(&chart.join("Chart.yaml"))?;
    let context = json!({
        "Values": values,
        "Chart": { "AppVersion": chart_yaml["appVersion"], "Name": chart_yaml["name"], "Version": chart_yaml["version"] },
        "Release": { "Name": "dataplane", "Namespace": NAMESPACE },
    });
    let context = Context::from(term(&context));
    let mut found = Vec::new();
    for entry in fs::read_dir(chart.join("templates"))? {
        let path = entry?.path();
        let mut template = Template::default();
        template.add_funcs(&[
            ("toYaml", to_yaml as gtmpl::Func),
            ("nindent", nindent),
            ("join", join),
            ("quote", quote),
            ("default", default),
        ]);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        template.parse(text).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        let text = template.render(&context).map_err(|error| anyhow!("{}: {error}", path.display()))?;
        // NOTES.txt has no objects
        if path.extension().is_some_and(|extension| extension == "yaml") {
            found.extend(objects::parse(&text).with_context(|| path.display().to_string())?);
        }
    }
    Ok(found)
}

fn yaml(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_norway::from_str(&text).with_context(|| path.display().to_string())
}

/// Merges like Helm: mappings by key, everything else as a whole.
fn merge(values: &mut Value, overrides: &Value) {
    match (values, overrides) {
        (Value::Object(values), Value::Object(overrides)) => {
            for (name, value) in overrides {
                merge(values.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (values, overrides) => *values = overrides.clone(),
    }
}

fn term(value: &Value) -> Term {
    match value {
        Value::Null => Term::Nil,
        Value::Bool(value) => Term::Bool(*value),
        Value::Number(number) => number.as_i64().map_or(Term::Nil, Term::from),
        Value::String(text) => Term::String(text.clone()),
        Value::Array(items) => Term::Array(items.iter().map(term).collect()),
        Value::Object(fields) => Term::Map(
            fields.iter().map(|(name, value)| (name.clone(), term(value))).collect::<HashMap<_, _>>(),
        ),
    }
}

fn value(term: &Term) -> Result<Value, FuncError> {
    Ok(match term {
        Term::NoValue | Term::Nil => Value::Null,
        Term::Bool(value) => json!(value),
        Term::String(text) => json!(text),
        Term::Number(number) => json!(number.as_i64()),
        Term::Array(items) => Value::Array(items.iter().map(value).collect::<Result<_, _>>()?),
        Term::Object(fields) | Term::Map(fields) => {
            let fields = fields.iter().map(|(name, term)| Ok((name.clone(), value(term)?)));
            Value::Object(fields.collect::<Result<_, FuncError>>()?)
        }
        Term::Function(_) => return Err(FuncError::Generic("a function is not a value".to_owned())),
    })
}

fn to_yaml(arguments: &[Term]) -> Result<Term, FuncError> {
    let [term] = arguments else { return Err(FuncError::ExactlyXArgs("toYaml".to_owned(), 1)) };
    let text =
        serde_norway::to_string(&value(term)?).map_err(|error| FuncError::Generic(error.to_string()))?;
    Ok(Term::String(text.trim_end().to_owned()))
}

fn nindent(arguments: &[Term]) -> Result<Term, FuncError> {
    let [Term::Number(depth), Term::String(text)] = arguments else {
        return Err(FuncError::ExactlyXArgs("nindent".to_owned(), 2));
    };
    let indent = " ".repeat(depth.as_u64().unwrap_or_default() as usize);
    Ok(Term::String(format!("\n{indent}{}", text.replace('\n', &format!("\n{indent}")))))
}

fn join(arguments: &[Term]) -> Result<Term, FuncError> {
    let [Term::String(separator), Term::Array(items)] = arguments else {
        return Err(FuncError::ExactlyXArgs("join".to_owned(), 2));
    };
    let words: Vec<String> = items.iter().map(ToString::to_string).collect();
    Ok(Term::String(words.join(separator)))
}

fn quote(arguments: &[Term]) -> Result<Term, FuncError> {
    let [term] = arguments else { return Err(FuncError::ExactlyXArgs("quote".to_owned(), 1)) };
    Ok(Term::String(format!("{:?}", term.to_string())))
}

fn default(arguments: &[Term]) -> Result<Term, FuncError> {
    let [fallback, term] = arguments else { return Err(FuncError::ExactlyXArgs("default".to_owned(), 2)) };
    let is_empty = matches!(term, Term::NoValue | Term::Nil) || *term == Term::String(String::new());
    Ok(if is_empty { fallback } else { term }.clone())
}
